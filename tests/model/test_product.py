"""Products, and the form of them that a CPU computes fast."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.product import einsum
from train.devices.mesh import one_device_mesh

SIZES = dict(zip("btsdhckgfv", (2, 3, 5, 8, 2, 4, 2, 3, 6, 7), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "equation",
    [
        "btd,df->btf", "btf,df->btd", "btd,btf->df", "btf,btd->fd", "btd,dhc->bhtc", "bhtc,dhc->btd", "btd,bhtc->dhc",
        "bhtc,hcd->btd", "bhtc,btd->hcd", "bkgtc,bksc->bkgts", "bkgts,bksc->bkgtc", "bkgtc,bkgts->bksc",
        "btv,dv->btd", "btd,btv->dv",
    ],
)  # fmt: skip
def test_a_product_on_one_cpu_is_that_of_numpy(equation: str, dtype: str):
    random = np.random.default_rng(0)
    shapes = [[SIZES[letter] for letter in letters] for letters in equation.split("->")[0].split(",")]
    # Whole numbers, so that both dtypes are exact.
    x, y = (random.integers(-9, 10, shape).astype(dtype) for shape in shapes)
    with jax.set_mesh(one_device_mesh()):
        z = jax.jit(partial(einsum, equation, out_sharding=None))(jnp.asarray(x), jnp.asarray(y))
    assert z.dtype == jnp.float32
    np.testing.assert_array_equal(z, np.einsum(equation, x.astype(np.float32), y.astype(np.float32)))


@pytest.mark.parametrize("equation", ["btf,btd->fd", "btd,btf->df"])
def test_on_one_cpu_the_gradient_of_a_weight_transposes_the_narrower_operand(equation: str):
    shapes = {"btf": (2, 8, 64), "btd": (2, 8, 16)}
    arrays = [jnp.zeros(shapes[letters]) for letters in equation.split("->")[0].split(",")]
    with jax.set_mesh(one_device_mesh()):
        jaxpr = jax.make_jaxpr(partial(einsum, equation, out_sharding=None))(*arrays)
    left = next(equation.invars[0].aval for equation in jaxpr.eqns if equation.primitive.name == "dot_general")
    assert left.shape == (16, 2, 8)
