// The computing warpgroups: scores, softmax and output of 64 query rows each, block after block, tile after tile.
#pragma once
#include "state.cuh"
#include "wgmma.cuh"

namespace ds_ring {

template <typename T, int NS>
__device__ __forceinline__ void compute(uint32_t base, const Barriers& bar, const Segs<NS>& g, const Params& p, int w,
                                        int rank) {
  const int lane = threadIdx.x & 31, quad = lane & 3;
  const int row0 = ((threadIdx.x >> 5) & 3) * 16 + (lane >> 2);  // this thread's rows: row0 and row0 + 8
  const uint32_t dq = desc(base + OFF_Q + w * Q_TILE, 16), dk = desc(base + OFF_RING, 16),
                 dv = desc(base + OFF_RING, 2048), dp = desc(base + OFF_P + w * P_TILE, 16);
  const Peer peer(base, bar, w, rank);
  TileReader tiles(bar);
  float O[128], S[32];
  uint32_t P[16];
#pragma unroll
  for (int i = 0; i < 32; ++i) S[i] = 0.f;
  Rows rows;
  int b = 0, h = 0, qend = 0;  // of the tile, and this warpgroup's half of it
  Half x = {};
  Walk<NS> k = {};
  uint32_t n_q = 0;                // query tiles taken so far
  uint32_t n = 0;                  // steps taken so far
  int c0 = 0, len = 0, shift = 0;  // of block k: first key of this CTA's half, number of keys, last key that row 0 sees

  auto release = [&](int s) {
    if (lane == 0) mbar_arrive(bar.empty + 8 * s);
  };
  auto fetch = [&]() -> bool {
    for (;;) {
      const int t = __shfl_sync(0xffffffffu, tiles.next<true>(), 0);  // warp-uniform for the compiler
      if (t >= p.n_tiles) return false;
      const Tile tile = decode(p, t);
      b = tile.b, h = tile.h, qend = tile.qend;
      x = w ? tile.q[1] : tile.q[0];
      k.start(g, p.n_seg, qend);
      if (k.left > 0) return true;
      store_unseen<T>(p, b, h, x, rank);
    }
  };
  auto next_block = [&]() {
    k.next(g, qend);
    c0 = k.j * BN + rank * 64;
    len = g.len[k.s];
    shift = x.gq - g.off[k.s];
  };
  auto issue_qk = [&](int s, uint32_t parity, bool first) {  // descriptor units are 16 bytes
    if (first && !(s & 1)) mbar_wait(bar.q_full + 8 * (4 * w + s / 2), n_q & 1);
    mbar_wait(bar.full + 8 * s, parity);
    wg_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i)
      Mma<T>::qk(S, dq + s * (BM * 128 / 16) + i * 2, dk + s * (SLOT / 16) + i * 2, s > 0 || i > 0);
    wg_commit();
  };
  auto issue_pv = [&](int s, uint32_t parity) {  // slots 0-3: the keys whose P is here; 4-7: the peer's
    mbar_wait(bar.full + 8 * s, parity);
    wg_fence();
    if (s < 4)
      Mma<T>::pv(O, P + 4 * s, dv + s * (SLOT / 16));
    else
      Mma<T>::pv(O, dp + (n & 1) * (2 * P_TILE / 16) + (s & 3) * 2, dv + s * (SLOT / 16), 1);
    wg_commit();
  };
  auto rescale = [&]() {
    if (__any_sync(0xffffffffu, rows.al.a != 1.f || rows.al.b != 1.f)) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        O[4 * i] *= rows.al.a;
        O[4 * i + 1] *= rows.al.a;
        O[4 * i + 2] *= rows.al.b;
        O[4 * i + 3] *= rows.al.b;
      }
    }
  };
  auto masked_max = [&]() -> Pair {
    if (c0 + 64 > len || c0 + 63 > shift) mask(S, c0 + quad * 2, row0, len, shift);
    return row_max(S);
  };
  auto move_maxima = [&](Pair mine, Pair other) {
    move_max(rows.m.a, fmaxf(mine.a, other.a), rows.al.a, p.scale_log2);
    move_max(rows.m.b, fmaxf(mine.b, other.b), rows.al.b, p.scale_log2);
    rows.l.a *= rows.al.a;
    rows.l.b *= rows.al.b;
  };
  auto start_tile = [&]() {  // before its first block's maxima
    rows = Rows();
    if (p.po) start_rows(rows, previous_lse(p, Place(b, h, x, row0)), p.scale_log2, rank == 0 && quad == 0);
  };
  auto start_output = [&]() {
    const Place at(b, h, x, row0);
    if (p.po) {
      start_out<T>(O, p, at, previous_lse(p, at), rank, quad);
    } else {
#pragma unroll
      for (int i = 0; i < 128; ++i) O[i] = 0.f;
    }
  };
  auto q_done = [&]() {  // the scores of this tile's last block have retired: its queries may be overwritten
    if (k.left == 0 && lane == 0) mbar_arrive(bar.q_empty + 8 * w);
  };

  if (!fetch()) return;
  next_block();
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    issue_qk(s, 0, true);
    if (s > 0) {
      wg_wait<1>();
      release(s - 1);
    }
  }
  ++n_q;
  wg_wait<0>();
  release(7);
  q_done();
  keep(S);
  start_tile();
  {
    const Pair u = masked_max();
    peer.send_max(0, u, false);
    move_maxima(u, peer.get_max(0));
  }
  exponentiate<T, 0>(S, P, rows, p.scale_log2);
  exponentiate<T, 1>(S, P, rows, p.scale_log2);
  peer.send_p<0>(0, P);
  peer.send_p<1>(0, P);
  start_output();

  bool more, last = k.left == 0;  // the block whose P is ready (step n) ends its tile
  if (!last) next_block();        // from here on k is the block after it
#pragma unroll 1
  do {
    bool last_next = true;
    const Place ended(b, h, x, row0);
    const Pair m_ended = rows.m;
    Pair l_ended = {0.f, 0.f};
    more = !last || fetch();
    if (more) {
      if (last) next_block();
      issue_qk(0, 1, last);  // scores of the next block
      issue_qk(1, 1, last);
      wg_wait<1>();
      release(0);
      issue_qk(2, 1, last);
      keep(O);
      rescale();
      keep(O);
      wg_wait<1>();
      release(1);
#pragma unroll
      for (int s = 3; s < 8; ++s) {
        issue_qk(s, 1, last);
        wg_wait<1>();
        release(s - 1);
      }
      if (last) ++n_q;
      issue_pv(0, 0);
      issue_pv(1, 0);
      wg_wait<2>();
      release(7);
      q_done();
      keep(S);
      const Pair u = masked_max();
      peer.send_max(n + 1, u, last);
      if (last) {
        l_ended = quad_sum(rows.l);
        peer.send_sums(n + 1, l_ended);
        start_tile();
      }
      issue_pv(2, 0);
      issue_pv(3, 0);
      wg_wait<2>();
      release(0);
      release(1);
      last_next = k.left == 0;
      if (!last_next) next_block();  // here, not at the top, where the tensor cores would wait for it
      peer.wait_p(n);
      issue_pv(4, 0);
      issue_pv(5, 0);
      move_maxima(u, peer.get_max(n + 1));
      wg_wait<2>();  // P may be overwritten
      release(2);
      release(3);
      exponentiate<T, 0>(S, P, rows, p.scale_log2);
      issue_pv(6, 0);
      issue_pv(7, 0);
      peer.send_p<0>(n + 1, P);
      wg_wait<2>();
      release(4);
      release(5);
      exponentiate<T, 1>(S, P, rows, p.scale_log2);
      peer.send_p<1>(n + 1, P);
      // everything retires before the back edge: with products in flight across it ptxas serializes all of them
      wg_wait<0>();
      release(6);
      release(7);
      keep(O);
    } else {
      l_ended = quad_sum(rows.l);
      peer.send_max(n + 1, l_ended, true);
      peer.send_sums(n + 1, l_ended);
      rescale();
      keep(O);
#pragma unroll
      for (int s = 0; s < 4; ++s) issue_pv(s, 1);
      peer.wait_p(n);
#pragma unroll
      for (int s = 4; s < 8; ++s) issue_pv(s, 1);
      wg_wait<0>();
      keep(O);
      peer.get_max(n + 1);
    }
    ++n;
    if (last) {
      const Pair other = peer.get_sums(n);
      store<T>(O, p, ended, m_ended, {l_ended.a + other.a, l_ended.b + other.b}, rank, quad);
      if (more) start_output();
    }
    last = last_next;
  } while (more);
}

}  // namespace ds_ring
