// The loading warps of a CTA: keys and values, queries, and tile numbers for the pair.
#pragma once
#include "shared.cuh"

namespace ds_ring {

// One thread. K of the first block, then K of every next block ahead of V of the present one, across tiles.
template <int NS>
__device__ __forceinline__ void load_keys_and_values(uint32_t base, const Barriers& bar, const Segs<NS>& g,
                                                     const Params& p, int rank) {
  const uint32_t ring = base + OFF_RING;
  TileReader tiles(bar);
  uint32_t n = 0;  // batches of 8 slots requested
  int b = 0, hk = 0, qend = 0, ask = 0;
  Walk<NS> k = {};
  auto fetch = [&]() -> bool {
    for (;;) {
      const int t = tiles.next<false>();
      if (t >= p.n_tiles) return false;
      const Tile x = decode(p, t);
      b = x.b;
      hk = x.h / p.G;
      qend = x.qend;
      k.start(g, p.n_seg, qend);
      if (k.left > 0) break;
      if (rank == 0) mbar_arrive(bar.request);
    }
    ask = min(k.left - 1, 3);  // for the next tile, when this many blocks are still to come
    return true;
  };
  auto step = [&]() {
    k.next(g, qend);
    if (rank == 0 && k.left == ask) mbar_arrive(bar.request);
  };
  auto request = [&](int s) {
    mbar_wait(bar.empty + 8 * s, (n & 1) ^ 1);
    mbar_expect(bar.full + 8 * s, SLOT);
  };
  auto load_k = [&]() {  // this CTA's half of the keys
#pragma unroll 1
    for (int s = 0; s < NSLOT; ++s) {
      request(s);
      tma_load(ring + s * SLOT, &g.map[2 * k.s], bar.full + 8 * s, k.j * BN + rank * 64, s, hk, b);
    }
    ++n;
  };
  auto load_v = [&](int seg, int j, int hk, int b) {  // all keys, its own half first; this CTA's columns
#pragma unroll 1
    for (int s = 0; s < NSLOT; ++s) {
      const int half = s < 4 ? rank : 1 - rank;
      request(s);
      tma_load(ring + s * SLOT, &g.map[2 * seg + 1], bar.full + 8 * s, j * BN + half * 64 + (s & 3) * 16, 4 * rank, hk, b);
    }
    ++n;
  };
  if (!fetch()) return;
  step();
  load_k();
  bool more;
  do {
    const int seg = k.s, j = k.j, hk0 = hk, b0 = b;
    more = k.left > 0 || fetch();
    if (more) {
      step();
      load_k();
    }
    load_v(seg, j, hk0, b0);
  } while (more);
}

// One warp. Queries, a quarter of the head's dimensions at a time; a previous result is brought into the L2.
template <int NS>
__device__ __forceinline__ void load_queries(uint32_t base, const Barriers& bar, const CUtensorMap& map,
                                             const Segs<NS>& g, const Params& p, int rank) {
  const int lane = threadIdx.x & 31;
  TileReader tiles(bar);
  uint32_t n = 0;
  for (;;) {
    const int t = tiles.next<true>();
    if (t >= p.n_tiles) break;
    const Tile x = decode(p, t);
    Walk<NS> k;
    k.start(g, p.n_seg, x.qend);
    if (k.left <= 0) continue;
    if (lane == 0) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        mbar_wait(bar.q_empty + 8 * w, (n & 1) ^ 1);
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const uint32_t full = bar.q_full + 8 * (4 * w + i);
          mbar_expect(full, Q_TILE / 4);
          tma_load(base + OFF_Q + w * Q_TILE + i * (Q_TILE / 4), &map, full, x.q[w].row, 2 * i, x.h, x.b);
        }
      }
    }
    __syncwarp();
    ++n;
    if (p.po) {
      const int es = p.prev32 ? 4 : 2;
#pragma unroll
      for (int w = 0; w < 2; ++w)
        for (int r = lane; r < x.q[w].rows; r += 32) {
          const char* a = (const char*)p.po + (x.b * p.po_b + (x.q[w].row + r) * p.po_m + x.h * p.po_h + rank * HALF) * es;
          asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(a)), "r"(HALF * es)
                       : "memory");
        }
    }
  }
}

// One thread of CTA 0: draws a tile whenever the loader asks, and tells both CTAs. Ends with the first number past the last.
__device__ __forceinline__ void draw_tiles(const Barriers& bar, const Params& p) {
  const int pairs = gridDim.x >> 1;
  int t = blockIdx.x >> 1;
  for (int i = 0;; ++i) {
    if (i > 0) {
      mbar_wait(bar.request, (i - 1) & 1);
      t = atomicAdd(p.counter, 1) + pairs;
    }
    mbar_wait_cluster(bar.tile_read + 8 * (i & 1), ((i >> 1) & 1) ^ 1);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      st_cluster(mapa(bar.tile_number + 4 * (i & 1), c), (uint32_t)t);
      mbar_arrive_cluster(mapa(bar.tile + 8 * (i & 1), c));
    }
    if (t >= p.n_tiles) break;
  }
  __threadfence();
  if (atomicAdd(p.counter + 1, 1) == pairs - 1) {  // the last one leaves the counters zeroed
    p.counter[0] = 0;
    p.counter[1] = 0;
  }
}

}  // namespace ds_ring
