// What is computed, and in which order: tiles of queries, and the blocks of keys each of them sees.
#pragma once
#include <cuda.h>

namespace ds_ring {

constexpr int BM = 64;      // query rows of a warpgroup; a tile is two such halves of one head, not always neighbours
constexpr int BN = 128;     // keys of a step: the scores of 64 for each CTA of the pair
constexpr int MAXQ = 16;    // chunks of queries a call may have

struct Params {
  void* o;
  float* lse;
  const void* po;      // previous out, or null
  const float* plse;   // previous lse
  int* counter;        // two zeroed ints; left zeroed
  long long o_b, o_m, o_h, lse_b, lse_h, po_b, po_m, po_h, plse_b, plse_h;
  int Hq, G, n_seg, head_halves, n_tiles, reverse, out32, prev32;  // head_halves: of one head; n_tiles: of all
  float scale, scale_log2;
  int q_row[MAXQ], q_len[MAXQ], q_off[MAXQ], q_halves[MAXQ];
};
template <int NS>
struct Segs {
  CUtensorMap map[2 * NS];  // K, V of each segment
  int len[NS], off[NS];
};

struct Half {
  int row, rows, gq, end;  // row: in the tensor; rows: valid ones, at most 0 to 64; gq: global position; end: of the last one
};
__device__ __forceinline__ Half half_of(const Params& p, int i) {
  Half x = {p.q_row[0], 0, p.q_off[0], p.q_off[0]};  // -1: no rows
  if (i < 0) return x;
  int c = 0;
  while (i >= p.q_halves[c]) i -= p.q_halves[c++];
  const int m = i * BM;
  x.row = p.q_row[c] + m;
  x.rows = min(p.q_len[c] - m, BM);
  x.gq = p.q_off[c] + m;
  x.end = x.gq + x.rows - 1;
  return x;
}
struct Tile {
  int b, h, qend;  // qend: the last position of a query
  Half q[2];
};
// Chunks end where they end: the last rows of one and the first of another share a tile. An odd half is alone with the
// fewest keys.
__device__ __forceinline__ Tile decode(const Params& p, int t) {
  const int head_tiles = (p.head_halves + 1) >> 1, hb = t / head_tiles;
  int i = t - hb * head_tiles;
  if (p.reverse) i = head_tiles - 1 - i;  // causal: longest first
  Tile x;
  x.b = hb / p.Hq;
  x.h = hb - x.b * p.Hq;
  const int first = 2 * i - (p.head_halves & 1);
  x.q[0] = half_of(p, first);
  x.q[1] = half_of(p, first + 1);
  x.qend = max(x.q[0].end, x.q[1].end);
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
