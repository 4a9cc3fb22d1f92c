// Arguments of the attention kernels, the same for the C ABI and for every instruction-set level.
//
// qkv and grad_qkv are (batch, tokens, 3, heads, head_dim) in qkv_dtype, out and grad (batch, tokens, heads * head_dim) in out_dtype; lse is
// (batch, heads, tokens), table (tokens, head_dim / 2, 2) with cos and sin of every angle, bias (3, heads, head_dim), the others (head_dim),
// all in fp32. All contiguous. What may be null: table, bias, q_weight with k_weight, q_bias with k_bias. sums is (batch, heads, 7,
// head_dim): over the tokens, the gradients of q_weight, q_bias, k_weight, k_bias, and of bias for q, k and v; those of what is null are 0.
// scratch has attention_scratch floats for every thread.
#pragma once

#define LIGHTNINGDIT_ATTENTION_SCRATCH(name) int64_t name(int64_t tokens, int64_t head_dim, int backward)

#define LIGHTNINGDIT_ATTENTION_FORWARD(name)                                                                              \
  int name(const void* qkv, const float* table, const float* bias, const float* q_weight, const float* k_weight,          \
           const float* q_bias, const float* k_bias, void* out, float* lse, float* scratch, int64_t batch,                \
           int64_t tokens, int64_t heads, int64_t head_dim, float eps, int center, int qkv_dtype, int out_dtype,          \
           int threads)

#define LIGHTNINGDIT_ATTENTION_BACKWARD(name)                                                                             \
  int name(const void* grad, const void* qkv, const float* lse, const float* table, const float* bias,                     \
           const float* q_weight, const float* k_weight, const float* q_bias, const float* k_bias, void* grad_qkv,        \
           float* sums, float* scratch, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, float eps,        \
           int center, int qkv_dtype, int out_dtype, int threads)
