// From accumulators to memory: normalising, merging with a previous partial result, and wide stores.
#pragma once
#include "ptx.cuh"

namespace ds_ring {

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t v);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t v) {
  return __half22float2(*reinterpret_cast<__half2*>(&v));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t v) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v));
}
template <typename E>
struct IsF32 {
  static constexpr bool v = false;
};
template <>
struct IsF32<float> {
  static constexpr bool v = true;
};
template <typename E>
__device__ __forceinline__ float2 ld_pair(const E* p) {
  if constexpr (IsF32<E>::v)
    return *reinterpret_cast<const float2*>(p);
  else
    return unpack<E>(*reinterpret_cast<const uint32_t*>(p));
}
// weights of a new partial result (lse n, factor c) and a previous one (lse v): total for infinities, NaN stays NaN
__device__ __forceinline__ float merge_weights(float n, float v, float& c, float& wp) {
  const float m = fmaxf(n, v);
  if (m == -INFINITY && v == v && n == n) {
    wp = 0.f;
    return -INFINITY;
  }
  const float en = n == m ? 1.f : expf(n - m), ep = v == m ? 1.f : expf(v - m), s = en + ep;
  c *= en / s;
  wp = ep / s;
  return m + logf(s);
}
// lane q of a quad gives u[i] (column group i) and gets all four lanes' words of group q
__device__ __forceinline__ uint4 quad_transpose(const uint32_t (&u)[4], int quad) {
  const bool b0 = quad & 1, b1 = quad & 2;
  const uint32_t x = __shfl_xor_sync(0xffffffffu, b0 ? u[0] : u[1], 1), y = __shfl_xor_sync(0xffffffffu, b0 ? u[2] : u[3], 1);
  const uint32_t v0 = b0 ? x : u[0], v1 = b0 ? u[1] : x, v2 = b0 ? y : u[2], v3 = b0 ? u[3] : y;
  const uint32_t s = __shfl_xor_sync(0xffffffffu, b1 ? v0 : v2, 2), t = __shfl_xor_sync(0xffffffffu, b1 ? v1 : v3, 2);
  return b1 ? make_uint4(s, t, v2, v3) : make_uint4(v0, v1, s, t);
}
// O * c (+ previous * w) to global memory: rows a and b of this thread, 256 columns of its warpgroup
template <typename T, typename OutT, typename PrevT, bool PREV>
__device__ __forceinline__ void store_tile(const float (&O)[128], OutT* oa, OutT* ob, const PrevT* pa, const PrevT* pb,
                                           float ca, float cb, float wa, float wb, bool va, bool vb, int quad) {
  // pointers: this row, first column of the warpgroup
  float2 fa[3][4], fb[3][4];  // two groups ahead
  auto fetch = [&](int jj, float2 (&x)[4], float2 (&y)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int col = (jj * 4 + i) * 8 + quad * 2;
      x[i] = y[i] = make_float2(0.f, 0.f);
      if (va) x[i] = ld_pair<PrevT>(pa + col);
      if (vb) y[i] = ld_pair<PrevT>(pb + col);
    }
  };
  if (PREV) fetch(0, fa[0], fb[0]);
  if (PREV) fetch(1, fa[1], fb[1]);
#pragma unroll
  for (int jj = 0; jj < 8; ++jj) {
    if (PREV && jj < 6) fetch(jj + 2, fa[(jj + 2) % 3], fb[(jj + 2) % 3]);
    uint32_t ua[4], ub[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = jj * 4 + i;
      float a0 = O[4 * j] * ca, a1 = O[4 * j + 1] * ca, b0 = O[4 * j + 2] * cb, b1 = O[4 * j + 3] * cb;
      if (PREV && wa != 0.f) {  // weight 0: what was there may be anything, NaN included
        a0 = fmaf(wa, fa[jj % 3][i].x, a0);
        a1 = fmaf(wa, fa[jj % 3][i].y, a1);
      }
      if (PREV && wb != 0.f) {
        b0 = fmaf(wb, fb[jj % 3][i].x, b0);
        b1 = fmaf(wb, fb[jj % 3][i].y, b1);
      }
      if constexpr (IsF32<OutT>::v) {
        const int col = j * 8 + quad * 2;
        if (va) *reinterpret_cast<float2*>(oa + col) = make_float2(a0, a1);
        if (vb) *reinterpret_cast<float2*>(ob + col) = make_float2(b0, b1);
      } else {
        ua[i] = pack<T>(a0, a1);
        ub[i] = pack<T>(b0, b1);
      }
    }
    if constexpr (!IsF32<OutT>::v) {
      const uint4 x = quad_transpose(ua, quad), y = quad_transpose(ub, quad);
      if (va) *reinterpret_cast<uint4*>(oa + (jj * 4 + quad) * 8) = x;
      if (vb) *reinterpret_cast<uint4*>(ob + (jj * 4 + quad) * 8) = y;
    }
  }
}

}  // namespace ds_ring
