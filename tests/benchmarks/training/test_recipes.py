"""The recipes are those of the authors' released code: their numbers, literally."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from benchmarks.common.paths import CONFIGS

#: Recipe -> what the authors' code or paper has: (source, model, trainer, data).
RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "cifar_wau": (
        "djzgroup/wau: AlexNet, ResNet-50, VGG-19-BN, PreResNet-110",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "milestones": [81, 122]},
        {"max_epochs": 164},
        {"batch_size": 128},
    ),
    "cifar_wau_wrn": (
        "djzgroup/wau: WRN-28-10",
        {"lr": 0.1, "weight_decay": 1e-3, "milestones": [60, 120, 160], "gamma": 0.2, "options": {"dropout": 0.3}},
        {"max_epochs": 200},
        {"batch_size": 128},
    ),
    "cifar_wau_densenet": (
        "djzgroup/wau: DenseNet-BC-40-12, -100-12, ResNeXt-29",
        {"lr": 0.1, "weight_decay": 1e-3, "milestones": [150, 225]},
        {"max_epochs": 300},
        {"batch_size": 64},
    ),
    "cifar_csgd_densenet": (
        "C-SGD, TensorFlow code of DenseNet-40",
        {"lr": 3e-3, "milestones": [200, 400, 500]},
        {"max_epochs": 600},
        {},
    ),
    "cifar_srip": (
        "SRIP, released script for WRN-28-10 on CIFAR",
        {"lr": 0.1, "milestones": [60, 120, 160], "gamma": 0.2, "nesterov": True, "options": {"dropout": 0.3}},
        {"max_epochs": 200},
        {"batch_size": 128},
    ),
    "cifar_dsfb": (
        "ssregibility/Net_RL2",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "milestones": [150, 225]},
        {"max_epochs": 300},
        {"batch_size": 256},
    ),
    "cifar_expand": (
        "GUOShuxuan/expandnets, train_models_ks_7_cifar10.py",
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "milestones": [50, 100]},
        {"max_epochs": 150},
        {"batch_size": 128},
    ),
    "cifar_repr": ("RePr, section 5", {}, {"max_epochs": 100}, {"augment": False}),
    "cifar_repr_c3": (
        "iamaaditya/repr-ortho, train.py",
        {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0, "gamma": 0.5},
        {"max_epochs": 199 + 180},
        {"batch_size": 64, "train_images": 45_000, "augment": False},
    ),
}
#: Method -> (source, arguments of its callback, of share_filter_bases).
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "csgd_published": ("C-SGD, PyTorch code", {"strength": 3e-3, "vector_strength": 3e-4}, None),
    "csgd_densenet": ("C-SGD, TensorFlow code", {"strength": 3e-3, "vector_strength": 3e-3}, None),
    "srip_published": (
        "SRIP, released script",
        {"form": "srip", "squared": True, "linear": True, "milestones": {20: 1e-3, 50: 1e-4, 70: 1e-6, 120: 0.0}},
        None,
    ),
    "ocnn_published": (
        "OCNN, released recipes",
        {"form": "convolutional", "squared": False, "weight": 0.1, "exclude": ["net.conv1"]},
        None,
    ),
    "dsfb_cifar10": ("S16U1*", {"form": "basis", "unique": True}, {"shared": 16, "unique": 1, "double": True}),
    "dsfb_cifar100": ("ResNet-34 S32U1", {"form": "basis"}, {"shared": 32, "unique": 1}),
    "wau_official": ("djzgroup/wau", {"axis": "in", "sampling": "with_replacement"}, None),
    "repr_c3": ("repr-ortho", {"cycles": 9, "prune_fraction": 0.5, "criterion": "orthogonality"}, None),
    "expand_ck_fc": ("expandnets", {"kind": "CK+FC", "exclude": ["net.fc2"]}, None),
}


def read(kind: str, name: str) -> Any:
    return yaml.safe_load((CONFIGS / kind / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_published_numbers(name: str) -> None:
    _, model, trainer, data = RECIPES[name]
    recipe = read("recipe", name)
    assert recipe["model"] | model == recipe["model"]
    assert recipe["trainer"] | trainer == recipe["trainer"]
    assert recipe["data"]["init_args"] | data == recipe["data"]["init_args"]


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_the_published_numbers(name: str) -> None:
    _, arguments, bases = METHODS[name]
    method = read("method", name)
    (callback,) = method["trainer"]["callbacks"]
    assert callback["init_args"] | arguments == callback["init_args"]
    assert method.get("model", {}).get("shared_filter_bases") == bases


def test_the_released_learning_rate_is_halved_every_25000_steps() -> None:
    """45,000 images in whole batches of 64 are 703 steps; milestones are the nearest epochs."""
    milestones = read("recipe", "cifar_repr_c3")["model"]["milestones"]
    assert milestones == [round(25_000 * k / (45_000 // 64)) for k in range(1, 11)]
    assert round(25_000 * 11 / 703) > 379
    for name, images in (("fm5k_repr_c3", 5_000), ("fm1k_noisy_repr_c3", 1_000)):
        recipe = read("recipe", name)
        assert recipe["trainer"]["max_epochs"] * (images // 64) < 25_000
        assert "milestones" not in recipe["model"]


@pytest.mark.parametrize(
    ("recipe", "full", "sub"), [("cifar_repr_c3", 20, 20), ("fm5k_repr_c3", 4, 4), ("fm1k_noisy_repr_c3", 10, 10)]
)
def test_one_method_is_the_released_plan_at_every_length(recipe: str, full: int, sub: int) -> None:
    epochs = read("recipe", recipe)["trainer"]["max_epochs"]
    (callback,) = read("method", "repr_c3")["trainer"]["callbacks"]
    arguments = callback["init_args"]
    found = [max(1, round(arguments[name] * epochs)) for name in ("full_epochs", "sub_epochs")]
    assert found == [full, sub]
    assert 9 * (full + sub) < epochs <= 10 * full + 9 * sub
