from .callback import FilterCallback as FilterCallback
