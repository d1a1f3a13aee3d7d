// What is computed, and in which order: tiles of queries, and the blocks of keys each of them sees.
#pragma once
#include <cuda.h>

namespace ds_ring {

constexpr int BM = 64;      // query rows of a warpgroup; a tile is two of them
constexpr int BN = 128;     // keys of a step: the scores of 64 for each CTA of the pair
constexpr int MAXQ = 16;    // chunks of queries a call may have

struct Params {
  void* o;
  float* lse;
  const void* po;      // previous out, or null
  const float* plse;   // previous lse
  int* counter;        // two zeroed ints; left zeroed
  long long o_b, o_m, o_h, lse_b, lse_h, po_b, po_m, po_h, plse_b, plse_h;
  int Hq, G, n_seg, head_tiles, n_tiles, reverse, out32, prev32;  // head_tiles: of one head; n_tiles: of all
  float scale, scale_log2;
  int q_row[MAXQ], q_len[MAXQ], q_off[MAXQ], q_tiles[MAXQ];
};
template <int NS>
struct Segs {
  CUtensorMap map[2 * NS];  // K, V of each segment
  int len[NS], off[NS];
};

struct Tile {
  int b, h, row, rows, gq, qend;  // row: in the tensor; rows: valid ones; gq: global position; qend: of the last one
};
__device__ __forceinline__ Tile decode(const Params& p, int t) {
  Tile x;
  const int hb = t / p.head_tiles;
  int i = t - hb * p.head_tiles, c = 0;
  if (p.reverse) i = p.head_tiles - 1 - i;  // causal: longest first
  while (i >= p.q_tiles[c]) i -= p.q_tiles[c++];
  x.b = hb / p.Hq;
  x.h = hb - x.b * p.Hq;
  const int m = i * 2 * BM;
  x.row = p.q_row[c] + m;
  x.rows = p.q_len[c] - m;
  x.gq = p.q_off[c] + m;
  x.qend = p.q_off[c] + min(p.q_len[c], m + 2 * BM) - 1;
  return x;
}
// walks the key blocks that a tile sees; the same sequence in every role and in both CTAs of the pair
template <int NS>
struct Walk {
  int s, j, nb, left;
  __device__ __forceinline__ static int blocks(const Segs<NS>& g, int s, int qend) {
    return max(0, (min(g.len[s], qend + 1 - g.off[s]) + BN - 1) >> 7);
  }
  __device__ __forceinline__ void start(const Segs<NS>& g, int n_seg, int qend) {
    s = -1;
    j = -1;
    nb = 0;
    left = 0;
#pragma unroll 1
    for (int i = 0; i < n_seg; ++i) left += blocks(g, i, qend);
  }
  __device__ __forceinline__ void next(const Segs<NS>& g, int qend) {  // only when left > 0
    --left;
    if (++j < nb) return;
    j = 0;
#pragma unroll 1
    do nb = blocks(g, ++s, qend);
    while (nb <= 0);
  }
};

}  // namespace ds_ring
