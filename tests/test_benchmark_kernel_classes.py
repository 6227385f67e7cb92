"""What kernels are for, by names as a profiler of an H100 shows them."""

# ruff: noqa: E501 - names are as long as they are

import ast
from pathlib import Path

import pytest

from benchmarks.kernel_classes import CLASSES, OURS, KernelTime, by_class, class_of
from benchmarks.kernel_trace import Trace, busy_seconds, facts, kernels_of

KERNELS = Path(__file__).parents[1] / "bigsimclr" / "kernels"
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::"
UNROLLED = "void at::native::unrolled_elementwise_kernel<at::native::"
FOREACH = (
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<"
    "at::native::(anonymous namespace)::"
)
NAMES = {
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn",
        "sm80_xmma_dgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x64",
        "sm80_xmma_wgrad_implicit_gemm_indexed_wo_smem_bf16bf16_bf16f32_f32_nhwckrsc_nhwc",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_64x64_32x6_nhwc_align8>(...)",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688fprop_optimized_tf32_128x128_16x4>(...)",
        "nvjet_tst_128x64_64x9_1x2_h_bz_coopA_NNT",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, true, false>(...)",
        "ampere_sgemm_128x64_nn",
        "void cudnn::cnn::wgrad2d_grouped_direct_kernel<float, float, int, float, float, 4, 3>(...)",
        "void cask__5x_cudnn::computeOffsetsKernel<false, false>(cask__5x_cudnn::ComputeOffsetsParams)",
        "void cudnn::ops::scalePackedTensor_kernel<float, float>(long, float*, float)",
        "triton_tem_fused_mm_12",
    ],
    "normalisation": [
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<__half, float, 512, true, 1>(cudnnTensorStruct, ...)",
        "void cudnn::bn_bw_1C11_singleread<float, 512, true, 1, 2, 0>(float, float, ...)",
        "void cudnn::batchnorm_fwtr_nhwc_semiPersist<__half, __half, float, float, 4, 512>(...)",
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var, c10::BFloat16, float, 4>(...)",
        "void at::native::batch_norm_backward_elemt_channels_last_kernel<4, c10::BFloat16, float, float>(...)",
        "void at::native::batch_norm_transform_input_kernel<float, float, float, true, int>(...)",
        "triton_poi_fused__native_batch_norm_legit_functional_add_relu_12",
        "triton_red_fused_native_batch_norm_backward_threshold_backward_7",
        ELEMENTWISE + "(anonymous namespace)::launch_clamp_scalar(at::TensorIteratorBase&, ...)",
        ELEMENTWISE + "(anonymous namespace)::threshold_kernel_impl<c10::BFloat16>(...)",
        ELEMENTWISE + "CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >(int, ...)",
        "triton_poi_fused_add_threshold_backward_31",
        "measure",
        "differentiate",
    ],
    "selection": [
        "pool",
        "mix_backward",
        "void (anonymous namespace)::cunn_SpatialSoftMaxForward<c10::BFloat16, float, float, int, at::native::(anonymous namespace)::SoftMaxForwardEpilogue>(...)",
        "triton_poi_fused__softmax_18",
    ],
    "loss": [
        "slope",
        "add_up",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, at::native::(anonymous namespace)::LogSoftMaxForwardEpilogue>(...)",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>(...)",
        "triton_red_fused__log_softmax_masked_fill_nll_loss_forward_4",
    ],
    "optimizer": [
        "square",
        "move",
        FOREACH + "TensorListMetadata<3>, FusedSgdMathFunctor<float, 3, true>, float>(...)",
        FOREACH + "TensorListMetadata<1>, LpNormFunctor<float, (NormType)1, float, 1>>(...)",
        "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float, float>(...)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float, float, float>, unsigned int, float, 4> >(...)",
    ],
    "augmentation": ["_colour", "_soften"],
    "copies": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void cudnn::ops::nchwToNhwcKernel<__half, __half, float, false, true, (cudnnKernelDataType_t)0>(...)",
        ELEMENTWISE + "bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}, ...",
        UNROLLED
        + "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}, LoadWithCast<1>",
        ELEMENTWISE + "FillFunctor<float>, std::array<char*, 1ul> >(int, ...)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, unsigned int, 2, 64, 64>(...)",
        FOREACH + "TensorListMetadata<2>, Copy<c10::BFloat16, float>, float>(...)",
        "triton_poi_fused__to_copy_convolution_3",
        "triton_poi_fused_convolution_0",
    ],
    "communication": [
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    ],
    "other": [
        "take_maxima",
        "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>(...)",
        UNROLLED + "BinaryFunctor<float, float, float, at::native::MulFunctor>, LoadWithCast<2>",
        "triton_per_fused_mean_9",
        "applying",
    ],
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names]
)
def test_names_of_an_h100(kind: str, name: str) -> None:
    assert class_of(name) == kind


def test_all_our_kernels_have_a_class() -> None:
    """Every name that is launched, as `name[grid](...)` or of a module, and no other."""
    launched = set()
    for file in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).rpartition(".")[2])
    assert launched == OURS.keys()


def test_time_is_divided() -> None:
    found = by_class(
        [
            KernelTime("sm90_xmma_fprop", 40.0, 2),
            KernelTime("strange", 10.0, 5),
            KernelTime("stranger", 20.0, 1),
            KernelTime("sm90_xmma_wgrad", 30.0, 3),
        ],
        named=1,
    )
    assert list(found) == ["convolution", "other"]
    assert found["convolution"] == {
        "microseconds": 70.0,
        "launches": 5,
        "share": 0.7,
        "largest": [{"name": "sm90_xmma_fprop", "microseconds": 40.0, "launches": 2}],
    }
    assert found["other"]["largest"] == [{"name": "stranger", "microseconds": 20.0, "launches": 1}]
    assert by_class([]) == {}
    assert set(NAMES) == set(CLASSES)


def event(name: str, category: str, begin: float, microseconds: float) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": microseconds}


def test_a_trace_is_read() -> None:
    # Twice a kernel, beside it a copy on another stream, and what is not the GPU's own work.
    events = [
        event("apply", "kernel", 100.0, 10.0),
        event("apply", "kernel", 130.0, 20.0),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 105.0, 15.0),
        event("Optimizer.step#LARS.step", "gpu_user_annotation", 90.0, 100.0),
        event("cudaLaunchKernel", "cuda_runtime", 90.0, 5.0),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 95.0},
        {"ph": "M", "name": "process_name"},
    ]
    kernels = kernels_of(events)
    assert kernels == [
        KernelTime("apply", 30.0, 2),
        KernelTime("Memcpy HtoD (Pinned -> Device)", 15.0, 1),
    ]
    assert busy_seconds(events) == pytest.approx(40e-6)  # 100 to 120, 130 to 150
    described = facts(Trace(kernels, steps=2, busy_seconds=40e-6, seconds=100e-6))
    assert described["step_milliseconds"] == 0.05
    assert described["busy_milliseconds"] == 0.02
    classes = described["classes"]
    assert isinstance(classes, dict)
    assert classes["normalisation"]["microseconds"] == 15.0
    assert classes["copies"]["launches"] == 0  # less than one in a step
