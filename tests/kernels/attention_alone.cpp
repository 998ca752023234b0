// Attention in CUDA, forward and backward, as functions of C: of one copy of its sources, which may
// have a mistake. Tensors are contiguous bfloat16: qkv (B, N, 3, H, d), out and grad (B, N, H, d);
// the bias, norm weights, rope and logsumexp are float32. Absent tensors are null.
#include MSF_ATTENTION
#include MSF_ATTENTION_BACKWARD

using namespace msf;

static HeadsView part(void* qkv, const HeadGrid& grid, int index) {
  const int64_t width = int64_t(grid.heads) * grid.head_dim;
  auto* first = static_cast<__nv_bfloat16*>(qkv) + index * width;
  return {{first}, 3 * width * grid.tokens, 3 * width, grid.head_dim};
}

static HeadsView whole(void* x, const HeadGrid& grid) {
  const int64_t width = int64_t(grid.heads) * grid.head_dim;
  return {{x}, width * grid.tokens, width, grid.head_dim};
}

extern "C" __attribute__((visibility("default"))) bool forward(const int* sizes, void* qkv,
                                                               void* bias, void* q_weight,
                                                               void* k_weight, void* rope,
                                                               void* out, void* logsumexp,
                                                               int shared) try {
  const HeadGrid grid{sizes[0], sizes[1], sizes[2], sizes[3]};
  attention(DType::bfloat16, grid, part(qkv, grid, 0), part(qkv, grid, 1), part(qkv, grid, 2),
            {{{bias}}, {{q_weight}}, {{k_weight}}, {}, {}, {rope}, 1e-6}, {out}, {logsumexp},
            shared, {});
  return true;
} catch (const std::exception&) {
  return false;
}

extern "C" __attribute__((visibility("default"))) bool backward(
    const int* sizes, void* qkv, void* bias, void* q_weight, void* k_weight, void* rope, void* out,
    void* grad, void* logsumexp, void* grad_qkv, void* partials, void* grad_bias,
    void* grad_q_weight, void* grad_k_weight) try {
  const HeadGrid grid{sizes[0], sizes[1], sizes[2], sizes[3]};
  attention_backward(DType::bfloat16, grid, part(qkv, grid, 0), part(qkv, grid, 1),
                     part(qkv, grid, 2), whole(out, grid), whole(grad, grid),
                     {{{bias}}, {{q_weight}}, {{k_weight}}, {}, {}, {rope}, 1e-6}, {logsumexp},
                     {grad_qkv}, {partials}, {{{grad_bias}}, {{grad_q_weight}}, {{grad_k_weight}}},
                     {});
  return true;
} catch (const std::exception&) {
  return false;
}
