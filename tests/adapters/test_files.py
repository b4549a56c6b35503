"""Each fine-tuning method has its settings, what it leaves, and what the trainer does with it."""

from typing import Any

import pytest

from deepfloyd_core.adapters.files import BITFIT, CONTROL, FULL, LORA, PRODUCTS, Product, product_of
from deepfloyd_core.adapters.method import METHODS
from deepfloyd_core.config.stage import StageConfig


@pytest.mark.parametrize(
    ("keys", "product"),
    [({}, LORA), ({"use_bitfit": True}, BITFIT), ({"controlnet": True}, CONTROL), ({"model_type": "full"}, FULL)],
)
def test_settings_choose_one_method(keys: dict[str, Any], product: Product) -> None:
    config = StageConfig.model_validate({"model_flavour": "tiny-i", **keys})
    assert product_of(config) is product and product.unlike(config) == []
    assert all(other.unlike(config) for other in PRODUCTS if other is not product)


def test_every_product_has_a_method() -> None:
    assert METHODS.keys() == {product.name for product in PRODUCTS}
