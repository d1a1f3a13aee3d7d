// Online softmax of one warpgroup's 64 rows over its CTA's half of the keys, in step with the same rows in the other CTA.
#pragma once
#include "shared.cuh"

namespace ds_ring {

// The running maximum moves only when it grows by more than this (log2): most steps then need no rescaling, and
// P stays below 2^6, far from fp16's limit.
constexpr float RESCALE_TAU = 6.0f;

struct Pair {  // a value for each of a thread's two rows, 8 apart
  float a, b;
};

struct Rows {  // running state of a thread's rows
  Pair m = {-INFINITY, -INFINITY};  // maximum of the raw scores that P is relative to: the same in both CTAs
  Pair l = {0.f, 0.f};              // sum of P over the columns of this thread, in this CTA
  Pair al = {1.f, 1.f};             // factor that the output still has to take
};

__device__ __forceinline__ Pair quad_sum(Pair x) {
  x.a += __shfl_xor_sync(0xffffffffu, x.a, 1);
  x.b += __shfl_xor_sync(0xffffffffu, x.b, 1);
  x.a += __shfl_xor_sync(0xffffffffu, x.a, 2);
  x.b += __shfl_xor_sync(0xffffffffu, x.b, 2);
  return x;
}

// -inf where a column is past the keys or in the future. c: column of S[0]; the rows see keys below len and up to shift
// + row.
__device__ __forceinline__ void mask(float (&S)[32], int c, int row, int len, int shift) {
  const int lim_a = min(len, row + shift + 1), lim_b = min(len, row + 8 + shift + 1);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (c + 8 * j >= lim_a) S[4 * j] = -INFINITY;
    if (c + 8 * j + 1 >= lim_a) S[4 * j + 1] = -INFINITY;
    if (c + 8 * j >= lim_b) S[4 * j + 2] = -INFINITY;
    if (c + 8 * j + 1 >= lim_b) S[4 * j + 3] = -INFINITY;
  }
}

__device__ __forceinline__ Pair row_max(const float (&S)[32]) {
  Pair u = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    u.a = fmaxf(u.a, fmaxf(S[4 * j], S[4 * j + 1]));
    u.b = fmaxf(u.b, fmaxf(S[4 * j + 2], S[4 * j + 3]));
  }
  u.a = fmaxf(u.a, __shfl_xor_sync(0xffffffffu, u.a, 1));
  u.b = fmaxf(u.b, __shfl_xor_sync(0xffffffffu, u.b, 1));
  u.a = fmaxf(u.a, __shfl_xor_sync(0xffffffffu, u.a, 2));
  u.b = fmaxf(u.b, __shfl_xor_sync(0xffffffffu, u.b, 2));
  return u;
}

// Both CTAs call this with the same maxima, so both take the same decision.
__device__ __forceinline__ void move_max(float& m, float u, float& al, float scale_log2) {
  al = 1.f;
  if (m == -INFINITY) {
    m = u;  // nothing accumulated yet
  } else if ((u - m) * scale_log2 > RESCALE_TAU) {
    al = ex2((m - u) * scale_log2);
    m = u;
  }
}

// P = 2^(S - m) in T of half the columns, laid out as the A operand of two products of 16 keys; row sums into l.
template <typename T, int HALF_NO>
__device__ __forceinline__ void exponentiate(const float (&S)[32], uint32_t (&P)[16], Rows& x, float scale_log2) {
  const float na = x.m.a == -INFINITY ? 0.f : -x.m.a * scale_log2, nb = x.m.b == -INFINITY ? 0.f : -x.m.b * scale_log2;
  float sa = 0.f, sb = 0.f;
#pragma unroll
  for (int j = 4 * HALF_NO; j < 4 * HALF_NO + 4; ++j) {
    const float a0 = ex2(fmaf(S[4 * j], scale_log2, na)), a1 = ex2(fmaf(S[4 * j + 1], scale_log2, na));
    const float b0 = ex2(fmaf(S[4 * j + 2], scale_log2, nb)), b1 = ex2(fmaf(S[4 * j + 3], scale_log2, nb));
    sa += a0 + a1;
    sb += b0 + b1;
    P[2 * j] = pack<T>(a0, a1);
    P[2 * j + 1] = pack<T>(b0, b1);
  }
  x.l.a += sa;
  x.l.b += sb;
}

// lane q of a quad gives u[i] (column group i) and gets all four lanes' words of group q
__device__ __forceinline__ uint4 quad_transpose(uint32_t u0, uint32_t u1, uint32_t u2, uint32_t u3, int quad) {
  const bool b0 = quad & 1, b1 = quad & 2;
  const uint32_t x = __shfl_xor_sync(0xffffffffu, b0 ? u0 : u1, 1), y = __shfl_xor_sync(0xffffffffu, b0 ? u2 : u3, 1);
  const uint32_t v0 = b0 ? x : u0, v1 = b0 ? u1 : x, v2 = b0 ? y : u2, v3 = b0 ? u3 : y;
  const uint32_t s = __shfl_xor_sync(0xffffffffu, b1 ? v0 : v2, 2), t = __shfl_xor_sync(0xffffffffu, b1 ? v1 : v3, 2);
  return b1 ? make_uint4(s, t, v2, v3) : make_uint4(v0, v1, s, t);
}

// What the warpgroup that has the same rows in the other CTA is told and tells: maxima and P of every step, row sums of
// every tile. Two buffers; the peer's message of step n + 1 proves that it is done with what it got in step n - 1.
struct Peer {
  uint32_t message, p;                    // this thread's places in this CTA
  uint32_t message_bar, p_bar;            // and this warpgroup's barriers
  uint32_t to_message, to_p;              // the same places in the peer
  uint32_t to_message_bar, to_p_bar;
  bool arms;                              // one thread of the warpgroup says what a barrier waits for
  int quad;
  uint32_t p_swizzle;

  __device__ __forceinline__ Peer(uint32_t base, const Barriers& bar, int w, int rank) {
    const int thread = threadIdx.x & 127, row = (thread >> 5) * 16 + ((thread & 31) >> 2);
    quad = thread & 3;
    arms = thread == 0;
    message = base + OFF_MESSAGE + w * MESSAGE + (thread >> 2) * 8;
    p = base + OFF_P + w * P_TILE + row * 128;
    p_swizzle = row & 7;
    message_bar = bar.message + 8 * w;
    p_bar = bar.p + 8 * w;
    to_message = mapa(message, rank ^ 1), to_p = mapa(p, rank ^ 1);
    to_message_bar = mapa(message_bar, rank ^ 1), to_p_bar = mapa(p_bar, rank ^ 1);
  }
  __device__ __forceinline__ void send_max(uint32_t n, Pair u, bool with_sums) const {
    const uint32_t buf = n & 1;
    if (arms) mbar_expect(message_bar + 16 * buf, with_sums ? MESSAGE : MESSAGE / 2);
    if (quad == 0) st_async(to_message + 2 * MESSAGE * buf, u.a, u.b, to_message_bar + 16 * buf);
  }
  __device__ __forceinline__ void send_sums(uint32_t n, Pair l) const {
    const uint32_t buf = n & 1;
    if (quad == 0) st_async(to_message + 2 * MESSAGE * buf + MESSAGE / 2, l.a, l.b, to_message_bar + 16 * buf);
  }
  __device__ __forceinline__ Pair get_max(uint32_t n) const {
    mbar_wait(message_bar + 16 * (n & 1), (n >> 1) & 1);
    const float2 v = ld_shared_pair(message + 2 * MESSAGE * (n & 1));
    return {v.x, v.y};
  }
  __device__ __forceinline__ Pair get_sums(uint32_t n) const {  // after get_max
    const float2 v = ld_shared_pair(message + 2 * MESSAGE * (n & 1) + MESSAGE / 2);
    return {v.x, v.y};
  }
  template <int HALF_NO>
  __device__ __forceinline__ void send_p(uint32_t n, const uint32_t (&P)[16]) const {
    const uint32_t buf = n & 1, to = to_p + 2 * P_TILE * buf, to_bar = to_p_bar + 16 * buf;
    if (HALF_NO == 0 && arms) mbar_expect(p_bar + 16 * buf, P_TILE);
    const uint32_t* u = P + 8 * HALF_NO;
    const uint32_t at = to + (((4 * HALF_NO + quad) ^ p_swizzle) << 4);
    st_async(at, quad_transpose(u[0], u[2], u[4], u[6], quad), to_bar);
    st_async(at + 8 * 128, quad_transpose(u[1], u[3], u[5], u[7], quad), to_bar);
  }
  __device__ __forceinline__ void wait_p(uint32_t n) const {
    mbar_wait(p_bar + 16 * (n & 1), (n >> 1) & 1);
    fence_async();  // the peer stored it; the tensor cores read it
  }
};

}  // namespace ds_ring
