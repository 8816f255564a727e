"""Products, and the form of them that a CPU computes fast."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.product import einsum
from train.devices.mesh import one_device_mesh

SIZES = dict(zip("btsdhckgfv", (2, 3, 5, 8, 2, 4, 2, 3, 6, 7), strict=True))


def on_one_cpu(equation: str, x: np.ndarray, y: np.ndarray) -> jax.Array:
    with jax.set_mesh(one_device_mesh()):
        return jax.jit(partial(einsum, equation, out_sharding=None))(jnp.asarray(x), jnp.asarray(y))


@pytest.mark.parametrize(
    "equation",
    [
        "btd,df->btf", "btf,df->btd", "btd,btf->df", "btf,btd->fd", "btd,dhc->bhtc", "bhtc,dhc->btd", "btd,bhtc->dhc",
        "bhtc,hcd->btd", "bhtc,btd->hcd", "bkgtc,bksc->bkgts", "bkgts,bksc->bkgtc", "bkgtc,bkgts->bksc",
        "btv,dv->btd", "btd,btv->dv",
    ],
)  # fmt: skip
def test_a_product_on_one_cpu_is_that_of_numpy(equation: str):
    random = np.random.default_rng(0)
    shapes = [[SIZES[letter] for letter in letters] for letters in equation.split("->")[0].split(",")]
    x, y = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    np.testing.assert_allclose(on_one_cpu(equation, x, y), np.einsum(equation, x, y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", ["btf,btd->fd", "btd,btf->df"])
def test_on_one_cpu_the_gradient_of_a_weight_transposes_the_narrower_operand(equation: str):
    shapes = {"btf": (2, 8, 64), "btd": (2, 8, 16)}
    arrays = [jnp.zeros(shapes[letters]) for letters in equation.split("->")[0].split(",")]
    with jax.set_mesh(one_device_mesh()):
        jaxpr = jax.make_jaxpr(partial(einsum, equation, out_sharding=None))(*arrays)
    left = next(equation.invars[0].aval for equation in jaxpr.eqns if equation.primitive.name == "dot_general")
    assert left.shape == (16, 2, 8)
