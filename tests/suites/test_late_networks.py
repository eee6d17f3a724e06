"""Networks that do not exist when callbacks are set up: built in ``setup`` or ``configure_model``, or on meta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, differing, fit, small_net

each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
#: They change the network in ``setup``: before the optimizers are made.
CHANGE_THE_NETWORK = ("expand", "importance")


class Late(Classifier):
    """Its network is built in the hook ``place``."""

    def __init__(self, place: str, lr_scale: float = 1.0) -> None:
        super().__init__(net=nn.Identity(), lr_scale=lr_scale)
        self.place = place

    def _build(self, place: str) -> None:
        if place == self.place and isinstance(self.net, nn.Identity):
            torch.manual_seed(0)
            self.net = small_net()

    def setup(self, stage: str) -> None:
        self._build("setup")

    def configure_model(self) -> None:
        self._build("configure_model")


class Materialises(Classifier):
    """Constructed on meta; values come in ``configure_model``."""

    def configure_model(self) -> None:
        if next(self.parameters()).is_meta:
            self.to_empty(device="cpu")
            torch.manual_seed(0)
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]


def on_meta(cls: type[Classifier], case: Case) -> Classifier:
    with torch.device("meta"):
        return cls(lr_scale=case.lr_scale)


def short_fit(callbacks: list[Any], model: Classifier) -> dict[str, torch.Tensor]:
    return fit(callbacks, model=model, limit_train_batches=2).tensors()


@pytest.mark.parametrize("place", ["setup", "configure_model"])
@each
def test_built_late(case: Case, place: str) -> None:
    """As one built in ``__init__``, or one line with the way out."""
    model = Late(place, lr_scale=case.lr_scale)
    if case.name in CHANGE_THE_NETWORK:
        with pytest.raises(
            MisconfigurationException, match=r"Late has no layer by then: build the network in __init__"
        ) as caught:
            short_fit([case.make()], model)
        assert "\n" not in str(caught.value)
        return
    assert not differing(short_fit([case.make()], model), short_fit([case.make()], Classifier(lr_scale=case.lr_scale)))


@each
def test_materialised_late(case: Case) -> None:
    if case.name == "expand":  # it reads the weights that it expands
        with pytest.raises(NotImplementedError, match="no data") as caught:
            short_fit([case.make()], on_meta(Materialises, case))
        # Lightning's clean-up fails on meta, whatever came before; both are shown.
        said = str(caught.value.__context__)
        assert "'net.0.weight' of Materialises has no values by then" in said
        assert "construct the network on a real device" in said
        return
    found = short_fit([case.make()], on_meta(Materialises, case))
    assert bool(differing(found, short_fit([], on_meta(Materialises, case)))) is case.trains_differently


@each
def test_never_materialised(case: Case) -> None:
    """Lightning itself refuses."""
    for callbacks in ([case.make()], []):
        with pytest.raises(NotImplementedError, match="no data"):
            short_fit(callbacks, on_meta(Classifier, case))
