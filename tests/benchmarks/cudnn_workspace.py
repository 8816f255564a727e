"""The memory that cuDNN's attention takes for itself in the backward pass, by the way that documents reach it.

    pip install nvidia-cudnn-frontend==1.32.0 && python -m tests.benchmarks.cudnn_workspace

XLA adds this workspace on a machine with a GPU alone, so that `ziggurat plan` does not count it. Here cuDNN compiles
its plan for an H100 without one, which needs gcc for a stand-in of NVIDIA's driver. The graphs are XLA's: documents
as offsets come without the number of all tokens, so that each of the most documents in a row counts as a whole row.
The attention is of 32 heads, 8 key/value heads, 128 wide, and one row.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

H, K, C = 32, 8, 128
# What cuDNN asks of a device.
H100 = {
    "deviceName": "NVIDIA H100 80GB HBM3", "cudaDeviceId": 0, "pciDeviceId": 0, "deviceVer": 900, "driverVer": 13000,
    "multiProcessorCount": 132, "smCountOrigin": 0, "smClockRateKHz": 1980000, "memClockRateKHz": 2619000,
    "memoryBusWidth": 5120, "l2CacheSize": 52428800, "totalGlobalMem": 84942979072, "warpSize": 32,
    "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536, "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024, "oversizedSharedMemoryPerBlock": 0, "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048, "isTccDriver": 0, "supportCoopLaunch": 1,
}  # fmt: skip
# Functions of the driver that cuDNN wants to find. Some of those that it calls while it makes a plan return a handle,
# some a number.
HANDLES = ("LibraryLoadData", "LibraryGetKernel", "KernelGetFunction", "ModuleLoadData", "ModuleGetFunction")
NUMBERS = {"KernelGetAttribute": 168, "OccupancyMaxPotentialClusterSize": 8}
OTHERS = (
    "CtxGetCurrent", "CtxGetLimit", "CtxPopCurrent", "CtxPushCurrent", "DeviceGet", "DeviceGetCount",
    "DriverGetVersion", "GetErrorName", "GetErrorString", "KernelSetAttribute", "LaunchCooperativeKernel",
    "LaunchKernel", "LaunchKernelEx", "LibraryLoadFromFile", "LibraryUnload", "LinkAddData", "LinkComplete",
    "LinkCreate", "LinkDestroy", "ModuleUnload", "StreamGetCtx", "TensorMapEncodeIm2col", "TensorMapEncodeTiled",
)  # fmt: skip


def load_driver_stand_in() -> None:
    """Loads a library that passes for NVIDIA's driver, on which nothing can run."""
    code = ["static int it;", "int cuInit(void) { return 100; }"]
    code += [f"int cu{name}(void **to) {{ *to = &it; return 0; }}" for name in HANDLES]
    code += [f"int cu{name}(int *to) {{ *to = {number}; return 0; }}" for name, number in NUMBERS.items()]
    code += [f"int cu{name}(void) {{ return 0; }}" for name in OTHERS]
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "driver.c"), Path(folder, "libcuda.so.1")
        source.write_text("\n".join(code))
        command = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def workspace_bytes(cudnn: Any, T: int, documents: int, mask: bool, gradient_of_mask: bool) -> int:
    """Returns the workspace of the backward pass; `documents` is the most in a row, 1 without offsets."""
    bfloat16, float32, int32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT, cudnn.data_type.INT32
    graph = cudnn.pygraph(
        io_data_type=bfloat16, intermediate_data_type=float32, compute_data_type=float32, sm_version=90,
        device_property=cudnn.create_device_properties(json.dumps(H100)),
    )  # fmt: skip

    def heads(count: int) -> dict[str, Any]:
        return {"dim": [documents, count, T, C], "stride": [T * count * C, C, count * C, 1]}

    q, o, do = (graph.tensor(data_type=bfloat16, **heads(H)) for _ in range(3))
    k, v = (graph.tensor(data_type=bfloat16, **heads(K)) for _ in range(2))
    stats = graph.tensor(dim=[documents, H, T, 1], stride=[H * T, T, 1, 1], data_type=float32)
    options, offsets = {}, None
    if mask:
        pairs = {"dim": [1, 1, T, T], "stride": [T * T, T * T, T, 1], "data_type": bfloat16}
        options["bias"] = graph.tensor(**pairs)
        if gradient_of_mask:
            options["dBias"] = graph.tensor(**pairs)
    if documents > 1:
        numbers = {"stride": [1, 1, 1, 1], "data_type": int32}
        lengths = graph.tensor(dim=[documents, 1, 1, 1], **numbers)
        options |= {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}
        offsets = graph.tensor(dim=[documents + 1, 1, 1, 1], **numbers)
    gradients = graph.sdpa_backward(
        q=q, k=k, v=v, o=o, dO=do, stats=stats, attn_scale=C**-0.5, use_causal_mask=True, **options
    )
    for gradient, count in zip(gradients, (H, K, K), strict=True):
        gradient.set_output(True).set_dim(heads(count)["dim"]).set_stride(heads(count)["stride"])
    for tensor in (q, k, v, o, do, *gradients) if offsets is not None else ():
        tensor.set_ragged_offset(offsets)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return int(graph.get_workspace_size())


def main() -> int:
    """Prints the workspaces."""
    load_driver_stand_in()
    import cudnn

    for T in (8192, 131072):
        rows = {"mask": (1, True, False), "mask, with its gradient": (1, True, True)}
        rows |= {f"offsets of at most {n} documents": (n, False, False) for n in (2, 16, 64)}
        for name, (documents, mask, gradient_of_mask) in rows.items():
            size = workspace_bytes(cudnn, T, documents, mask, gradient_of_mask)
            print(f"{T:>7,} positions, {name:<30} {size / 2**30:>9,.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
