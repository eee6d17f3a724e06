"""From result files to the tables of README, the cards and RESULTS."""
