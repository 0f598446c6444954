// The operators as ops.cpp registers them; meaning and argument order are those of flow_kernels/reference.py.
#pragma once
#include <ATen/ATen.h>

#include <string>
#include <tuple>

namespace flow_kernels {

using OptionalTensor = std::optional<at::Tensor>;

// `kernels`, here and below, names the kernels to use, "" for the best of this CPU. lse is fp64.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_fwd_cpu(
    const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& class_weight, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, const std::string& kernels);

// (loss, correct, entropy), here and below.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_score_cpu(
    const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index, double softcap,
    const std::string& kernels);

at::Tensor cross_entropy_bwd_cpu(
    const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& target, const at::Tensor& lse,
    const OptionalTensor& class_weight, int64_t ignore_index, double label_smoothing, double softcap, double z_loss,
    const std::string& kernels);

// (loss, dlogits); the weighted total is left to the caller, here and below.
std::tuple<at::Tensor, at::Tensor> cross_entropy_fwd_bwd_cpu(
    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& row_weight,
    const OptionalTensor& class_weight, int64_t ignore_index, double label_smoothing, double softcap, double z_loss,
    const std::string& kernels);

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_fwd_cpu(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    const OptionalTensor& linear_bias, const OptionalTensor& class_weight, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, const std::string& kernels);

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_score_cpu(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    const OptionalTensor& linear_bias, int64_t ignore_index, double softcap, const std::string& kernels);

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_bwd_cpu(
    const at::Tensor& dloss, const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    const at::Tensor& lse, const OptionalTensor& linear_bias, const OptionalTensor& class_weight, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, double grad_filter_eps, bool need_dinput,
    bool need_dlinear_weight, bool need_dlinear_bias, const std::string& kernels);

// (loss, dinput, dlinear_weight, dlinear_bias)
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_fwd_bwd_cpu(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target, const at::Tensor& row_weight,
    const OptionalTensor& linear_bias, const OptionalTensor& class_weight, int64_t ignore_index,
    double label_smoothing, double softcap, double z_loss, int64_t chunk_size, double grad_filter_eps, bool need_dinput,
    bool need_dlinear_weight, bool need_dlinear_bias, const std::string& kernels);

// (out [N, H, d], lse [N, H] fp32) and (dquery, dkey, dvalue).
std::tuple<at::Tensor, at::Tensor> packed_attention_fwd_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& segments, double scale,
    int64_t window, const std::string& kernels);

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_bwd_cpu(
    const at::Tensor& dout, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& lse, const at::Tensor& segments, double scale, int64_t window, const std::string& kernels);

}  // namespace flow_kernels
