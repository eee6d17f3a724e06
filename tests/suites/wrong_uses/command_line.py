"""YAML files and commands that are refused."""

from __future__ import annotations

from tests.suites.wrong_uses.row import Row
from tests.suites.wrong_uses.support import (
    MODEL,
    CommandError,
    checkpoint,
    command,
    fit_from_yaml,
    text_file,
    truncated,
    weights,
)

CONFIGURATION: list[Row] = [
    Row(
        "unknown argument in YAML",
        lambda: fit_from_yaml("RePr", "{full_epoch: 3}"),
        CommandError,
        "Problem with given class_path 'lightning_filterdiv.RePr': Option 'full_epoch' is not accepted",
    ),
    Row(
        "wrong type in YAML",
        lambda: fit_from_yaml("RePr", "{full_epochs: many}"),
        CommandError,
        "Problem with given class_path 'lightning_filterdiv.RePr': Parser key \"full_epochs\": Expected a <class "
        "'int'>. Got value: many",
    ),
    Row(
        "value out of range in YAML",
        lambda: fit_from_yaml("RePr", "{prune_fraction: 2.0}"),
        CommandError,
        "filterdiv fit: prune_fraction must be a finite number with 0 < prune_fraction < 1, got 2.0 (in the "
        "configuration)",
    ),
    Row(
        "misspelt class in YAML",
        lambda: fit_from_yaml("RePrr", "{}"),
        CommandError,
        "There is no callback 'RePrr'; did you mean 'RePr'?",
    ),
    Row(
        "wrong choice in YAML",
        lambda: fit_from_yaml("BasisOrthonormality", "{form: hard}"),
        CommandError,
        "Problem with given class_path 'lightning_filterdiv.BasisOrthonormality': Parser key \"form\": Expected a "
        "typing.Literal['basis', 'soft', 'double_soft', 'mutual_coherence', 'srip', 'convolutional']. Got value: "
        "hard",
    ),
    Row(
        "pattern without a list in YAML",
        lambda: fit_from_yaml("CentripetalSGD", "{include: conv1}"),
        CommandError,
        "Problem with given class_path 'lightning_filterdiv.CentripetalSGD': Parser key \"include\":",
    ),
    Row(
        "unknown section in YAML",
        lambda: fit_from_yaml("RePr", "{}", "trainr: {max_epochs: 1}\n"),
        CommandError,
        "filterdiv fit: Subcommand 'fit' does not accept option 'trainr.max_epochs'",
    ),
]

COMMAND_LINE: list[Row] = [
    Row(
        "inspect a missing file",
        lambda: command("inspect", "nothing.ckpt"),
        CommandError,
        "filterdiv inspect: nothing.ckpt: no such file, and no torchvision:NAME, timm:NAME or pkg.module:Class either",
    ),
    Row(
        "inspect a folder",
        lambda: command("inspect", "."),
        CommandError,
        "filterdiv inspect: . is a folder; name the .ckpt or .pt file in it",
    ),
    Row(
        "inspect a text file",
        lambda: command("inspect", text_file()),
        CommandError,
        "filterdiv inspect: text.ckpt is not a checkpoint: torch.save did not write it, or a part of it is missing; "
        "copy or save it again",
    ),
    Row(
        "inspect half a file",
        lambda: command("inspect", truncated()),
        CommandError,
        "filterdiv inspect: half.pt is not a checkpoint: torch.save did not write it, or a part of it is missing; "
        "copy or save it again",
    ),
    Row(
        "inspect weights of nobody",
        lambda: command("inspect", weights()),
        CommandError,
        "filterdiv inspect: bare.pt is a bare state dict: say which network it belongs to with --model "
        "(pkg.module:Class, torchvision:NAME or timm:NAME) or --config",
    ),
    Row(
        "inspect with a misspelt class",
        lambda: command("inspect", weights(), "--model", "lightning_filterdiv.demo:Smal"),
        CommandError,
        "filterdiv inspect: --model lightning_filterdiv.demo:Smal: lightning_filterdiv.demo has no 'Smal'; the "
        "closest names are SmallConvNet",
    ),
    Row(
        "inspect with a missing module",
        lambda: command("inspect", weights(), "--model", "no.such:Net"),
        CommandError,
        "filterdiv inspect: --model no.such:Net: cannot import 'no.such' (No module named 'no'); name an installed "
        "module, or one in the current folder",
    ),
    Row(
        "inspect with half a name",
        lambda: command("inspect", weights(), "--model", ":Net"),
        CommandError,
        "filterdiv inspect: --model ':Net' is none of pkg.module:Class, torchvision:NAME or timm:NAME",
    ),
    Row(
        "inspect what is no network",
        lambda: command("inspect", "lightning_filterdiv.demo:Digits"),
        CommandError,
        "filterdiv inspect: --model lightning_filterdiv.demo:Digits gives a Digits, not a torch.nn.Module; name a "
        "network",
    ),
    Row(
        "inspect a misspelt torchvision name",
        lambda: command("inspect", "torchvision:resnet"),
        CommandError,
        "filterdiv inspect: torchvision has no model 'resnet'; the closest names are resnet50, resnet34, resnet18",
    ),
    Row(
        "inspect into a file",
        lambda: command("inspect", checkpoint(), "--out", text_file()),
        CommandError,
        "filterdiv inspect: --out text.ckpt cannot be written (File exists: text.ckpt); name another folder",
    ),
    Row(
        "inspect layers that are not there",
        lambda: command("inspect", checkpoint(), "--include", "conv9"),
        CommandError,
        "filterdiv inspect: include pattern 'conv9' matches no convolution; the closest name is 'net.conv3'. "
        "Available: 'net.conv1', 'net.conv2', 'net.conv3'",
    ),
    Row(
        "inspect with a threshold of 2",
        lambda: command("inspect", checkpoint(), "--threshold", "2"),
        CommandError,
        "filterdiv inspect: --threshold must be a finite number with 0 <= --threshold < 1, got 2.0",
    ),
    Row(
        "merge a missing file",
        lambda: command("merge", "nothing.ckpt", "--out", "narrow.pt", *MODEL),
        CommandError,
        "filterdiv merge: nothing.ckpt: no such file; name a .ckpt or .pt file",
    ),
    Row(
        "merge without a destination",
        lambda: command("merge", checkpoint(), *MODEL),
        CommandError,
        "error: the following arguments are required: --out",
    ),
    Row(
        "merge what has no clusters",
        lambda: command("merge", checkpoint(), "--out", "narrow.pt", *MODEL),
        CommandError,
        "filterdiv merge: plain.ckpt: the checkpoint holds no clusters of CentripetalSGD: it must be saved in a fit "
        "with that callback, after its first step",
    ),
    Row(
        "merge with a shape of words",
        lambda: command("merge", checkpoint(), "--out", "narrow.pt", "--input-shape", "1x3x8"),
        CommandError,
        "error: argument --input-shape: must be positive integers such as 1,3,224,224, got '1x3x8'",
    ),
    Row(
        "merge with a negative tolerance",
        lambda: command("merge", checkpoint(), "--out", "narrow.pt", "--tolerance", "-1"),
        CommandError,
        "filterdiv merge: --tolerance must be a finite number with 0 <= --tolerance, got -1.0",
    ),
    Row(
        "merge with negative pairs",
        lambda: command("merge", checkpoint(), "--out", "narrow.pt", "--pairs", "-3"),
        CommandError,
        "filterdiv merge: --pairs must be an integer >= 0, got -3",
    ),
    Row(
        "merge into a missing folder",
        lambda: command("merge", checkpoint(), "--out", "none/narrow.pt", *MODEL),
        CommandError,
        "filterdiv merge: --out none/narrow.pt cannot be written: there is no folder none; make it first",
    ),
    Row(
        "demo without epochs",
        lambda: command("demo", "--epochs", "0"),
        CommandError,
        "filterdiv demo: --epochs must be at least 1, got 0",
    ),
    Row(
        "demo too short for its method",
        lambda: command("demo", "--epochs", "2"),
        CommandError,
        "filterdiv demo: --method repr needs at least 3 epochs, got --epochs 2",
    ),
    Row(
        "demo into a file",
        lambda: command("demo", "--out", text_file()),
        CommandError,
        "filterdiv demo: --out text.ckpt cannot be written (File exists: text.ckpt); name another folder",
    ),
    Row(
        "demo with a negative seed",
        lambda: command("demo", "--seed", "-1"),
        CommandError,
        "filterdiv demo: --seed must be at least 0, got -1",
    ),
    Row(
        "demo of unknown data",
        lambda: command("demo", "--data", "imagenet"),
        CommandError,
        "error: argument --data: invalid choice: 'imagenet'",
    ),
    Row(
        "entropy of nothing known",
        lambda: command("entropy", "--data", "nope"),
        CommandError,
        "filterdiv entropy: --data 'nope' is none of digits, fashion_mnist, torchvision:NAME, pkg.module:Name (a "
        "data set or LightningDataModule), or a folder",
    ),
    Row(
        "entropy of an empty folder",
        lambda: command("entropy", "--data", "."),
        CommandError,
        "filterdiv entropy: --data .: the folder holds no image files (.bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, "
        ".tif, .tiff, .webp)",
    ),
    Row(
        "entropy without a root",
        lambda: command("entropy", "--data", "torchvision:MNIST"),
        CommandError,
        "filterdiv entropy: --data torchvision:MNIST needs --root, the folder its files are in",
    ),
    Row(
        "entropy of no image",
        lambda: command("entropy", "--data", "digits", "--max-images", "0"),
        CommandError,
        "filterdiv entropy: --max-images must be at least 1, got 0",
    ),
    Row(
        "entropy for what is no network",
        lambda: command("entropy", "--data", "digits", "--model", "torch.nn:Identity"),
        CommandError,
        "filterdiv entropy: Identity cannot be traced: Identity has no convolution: there is no depth to speak of; "
        "name another",
    ),
    Row(
        "an unknown command",
        lambda: command("dance"),
        CommandError,
        "error: there is no command 'dance'; the commands are demo, merge, entropy, inspect, fit, validate, test",
    ),
    Row(
        "a misspelt command",
        lambda: command("inspct"),
        CommandError,
        "error: there is no command 'inspct'; did you mean 'inspect'?",
    ),
]
