// The state (out, lse) of a tile: carried in from a previous partial result, and out to memory.
#pragma once
#include "softmax.cuh"

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

// Where a thread's two rows of a tile are, and whether they exist.
struct Place {
  int b, h, row;  // row a; row b is 8 further
  bool a_valid, b_valid;
  __device__ __forceinline__ Place(int b, int h, const Half& x, int row0)
      : b(b), h(h), row(x.row + row0), a_valid(row0 < x.rows), b_valid(row0 + 8 < x.rows) {}
};

__device__ __forceinline__ Pair previous_lse(const Params& p, const Place& at) {
  const float* q = p.plse + at.b * p.plse_b + at.h * p.plse_h + at.row;
  return {at.a_valid ? q[0] : -INFINITY, at.b_valid ? q[8] : -INFINITY};
}

// The state that a tile starts from: P will be relative to the previous lse, whose sum of P is then 1.
__device__ __forceinline__ void start_rows(Rows& x, Pair lse, float scale_log2, bool counts) {
  constexpr float LOG2E = 1.4426950408889634f;
  x.m = {lse.a * (LOG2E / scale_log2), lse.b * (LOG2E / scale_log2)};
  x.l = {counts && lse.a != -INFINITY ? 1.f : 0.f, counts && lse.b != -INFINITY ? 1.f : 0.f};
}

template <typename E, typename T>
__device__ __forceinline__ float2 load_pair(const E* q) {
  if constexpr (sizeof(E) == 4)
    return *reinterpret_cast<const float2*>(q);
  else
    return unpack<T>(*reinterpret_cast<const uint32_t*>(q));
}
template <typename E, typename T>
__device__ __forceinline__ void load_out(float (&O)[128], const Params& p, const Place& at, int rank, int quad, bool a,
                                         bool b) {
  const E* q = (const E*)p.po + at.b * p.po_b + at.row * p.po_m + at.h * p.po_h + rank * HALF + quad * 2;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    float2 x = make_float2(0.f, 0.f), y = x;
    if (a) x = load_pair<E, T>(q + 8 * j);
    if (b) y = load_pair<E, T>(q + 8 * p.po_m + 8 * j);
    O[4 * j] = x.x, O[4 * j + 1] = x.y, O[4 * j + 2] = y.x, O[4 * j + 3] = y.y;
  }
}
// The previous output where there is one; what lies beside an lse of -inf may be anything, NaN included.
template <typename T>
__device__ __forceinline__ void start_out(float (&O)[128], const Params& p, const Place& at, Pair lse, int rank, int quad) {
  const bool a = at.a_valid && lse.a != -INFINITY, b = at.b_valid && lse.b != -INFINITY;
  if (p.prev32)
    load_out<float, T>(O, p, at, rank, quad, a, b);
  else
    load_out<T, T>(O, p, at, rank, quad, a, b);
}

// Normalise and store: rows a and b of this thread, the 256 columns of its CTA. l: over all columns and both CTAs.
template <typename T>
__device__ __forceinline__ void store(const float (&O)[128], const Params& p, const Place& at, Pair m, Pair l, int rank,
                                      int quad) {
  const float ca = l.a == 0.f ? 0.f : 1.f / l.a, cb = l.b == 0.f ? 0.f : 1.f / l.b;
  if (rank == 0 && quad == 0) {
    float* q = p.lse + at.b * p.lse_b + at.h * p.lse_h + at.row;
    if (at.a_valid) q[0] = l.a == 0.f ? -INFINITY : m.a * p.scale + logf(l.a);
    if (at.b_valid) q[8] = l.b == 0.f ? -INFINITY : m.b * p.scale + logf(l.b);
  }
  const long long first = at.b * p.o_b + at.row * p.o_m + at.h * p.o_h + rank * HALF;
  if (p.out32) {
    float* o = (float*)p.o + first + quad * 2;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      if (at.a_valid) *reinterpret_cast<float2*>(o + 8 * j) = make_float2(O[4 * j] * ca, O[4 * j + 1] * ca);
      if (at.b_valid)
        *reinterpret_cast<float2*>(o + 8 * p.o_m + 8 * j) = make_float2(O[4 * j + 2] * cb, O[4 * j + 3] * cb);
    }
    return;
  }
  T* o = (T*)p.o + first + quad * 8;
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    uint32_t ua[4], ub[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = 4 * (g * 4 + i);
      ua[i] = pack<T>(O[j] * ca, O[j + 1] * ca);
      ub[i] = pack<T>(O[j + 2] * cb, O[j + 3] * cb);
    }
    const uint4 x = quad_transpose(ua[0], ua[1], ua[2], ua[3], quad), y = quad_transpose(ub[0], ub[1], ub[2], ub[3], quad);
    if (at.a_valid) *reinterpret_cast<uint4*>(o + 32 * g) = x;
    if (at.b_valid) *reinterpret_cast<uint4*>(o + 8 * p.o_m + 32 * g) = y;
  }
}

// A tile whose rows see no key: what was there before, or 0 and -inf. Each warpgroup writes its rows, each CTA its columns.
template <typename T>
__device__ __forceinline__ void store_unseen(const Params& p, int b, int h, const Half& x, int rank) {
  for (int i = threadIdx.x & 127; i < x.rows * HALF; i += 128) {
    const int r = x.row + i / HALF, c = rank * HALF + i % HALF;
    const float lse = p.po ? p.plse[b * p.plse_b + h * p.plse_h + r] : -INFINITY;
    float v = 0.f;
    if (lse != -INFINITY) {
      if (p.po == p.o) continue;  // in place
      const long long a = b * p.po_b + r * p.po_m + h * p.po_h + c;
      v = p.prev32 ? ((const float*)p.po)[a] : widen(((const T*)p.po)[a]);
    }
    const long long a = b * p.o_b + r * p.o_m + h * p.o_h + c;
    if (p.out32)
      ((float*)p.o)[a] = v;
    else
      ((T*)p.o)[a] = narrow<T>(v);
    if (c == 0) p.lse[b * p.lse_b + h * p.lse_h + r] = lse;
  }
}

}  // namespace ds_ring
