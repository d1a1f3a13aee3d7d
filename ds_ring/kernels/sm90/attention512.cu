// Block attention forward for head_dim 512 on Hopper (sm_90a): fp16 or bf16 in, fp16, bf16 or fp32 out, lse in fp32.
//
// Why a kernel. At head_dim 512 a tile of 64 queries has a 64 x 512 fp32 accumulator: 128 KiB, half of an SM's registers.
// Kernels laid out for 128 spill there, and released ones stop at 256.
//
// Tiles. One CTA owns 64 query rows. Keys go in steps of 128, one block of 64 for each of two computing warpgroups:
// warpgroup w computes the scores of block w (64 x 64, 32 registers a thread), shares its row maxima and its tile of
// P = 2^(S - m) through shared memory, and owns output columns [256 w, 256 w + 256) (128 registers a thread).
//
// Warp roles. 3 warpgroups: number 0 loads (warps 0 and 1: one ring of K/V slots each; 2: Q, and a previous result into
// the L2; 3: tile numbers), 1 and 2 compute. setmaxnreg gives the loaders' registers to the computing ones.
//
// Clusters. Two CTAs on neighbouring tiles walk the same K/V. Causal: each loads half of every slot into both
// (multicast). Full: each loads its own, and the loaders meet at every step so that the L2 answers both with one read.
// CTAs are persistent: rank 0 of a pair draws the next pair of tiles from a counter near the end of the present one, the
// longest first, and the pipeline runs on across tiles.
//
// Barriers. full/empty per slot (TMA bytes arrive; four warps, in both CTAs with multicast, release), Q full/empty, tile
// numbers full/empty, a request for the next tile, and the loaders' meeting point. Named barriers 1 (row maxima), 2 (P
// tiles) and 5 (row sums, lse) join the two computing warpgroups.
//
// Shared memory, 227 KiB: Q 64 | 2 rings x 8 slots x 8 | P 2 buffers x 2 blocks x 8 | row maxima | row sums | barriers.
// A K slot is 64 keys x 64 dims, a V slot 16 keys x 256 dims; every tile has the 128-byte swizzle.
//
// Queries: up to MAXQ chunks (first row, rows, global position). Keys: up to 64 segments, each with its own tensor map,
// length and global position. Key j is visible from query i when j <= i by global positions (not causal: always).
// A previous partial result (normalised out, lse; -inf: nothing) can be merged on the way out, also in place.
#include "epilogue.cuh"
#include "ptx.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"

namespace ds_ring {

// The running maximum moves only when it grows by more than this (log2): most steps then need no rescaling, and
// P stays below 2^6, far from fp16's limit.
constexpr float RESCALE_TAU = 6.0f;

constexpr int D = 512, SLOT = 8192, NSLOT = 8;
constexpr uint32_t OFF_RING = 65536, OFF_P = OFF_RING + 2 * NSLOT * SLOT, OFF_MAX = OFF_P + 4 * 8192,
                   OFF_SUM = OFF_MAX + 1024, OFF_BAR = OFF_SUM + 512, SMEM = OFF_BAR + 512;
constexpr uint32_t SMEM_REQ = SMEM + 1024;  // slack to align the base to 1024 bytes
static_assert(SMEM_REQ <= 232448, "over the 227 KiB limit");

// MC: the two CTAs of a pair each load half of every K/V slot into both
template <typename T, int NS, bool MC>
__global__ void __launch_bounds__(384, 1)
    attention512(const __grid_constant__ CUtensorMap tmQ, const __grid_constant__ Segs<NS> g,
              const __grid_constant__ Params p) {
  extern __shared__ uint8_t smem_raw[];
  const uint32_t base = (smem_u32(smem_raw) + 1023u) & ~1023u;
  // the shuffle tells the compiler that the warpgroup index is warp-uniform
  const int wg = __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0), lane = threadIdx.x & 31;
  const int rank = (int)cluster_rank();

  const uint32_t bar_full = base + OFF_BAR, bar_empty = bar_full + 2 * NSLOT * 8, bar_q = bar_empty + 2 * NSLOT * 8,
                 bar_qe = bar_q + 8, bar_tile = bar_qe + 8, bar_tile_e = bar_tile + 16, bar_req = bar_tile_e + 16,
                 tile_no = bar_req + 8, bar_peer = tile_no + 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * NSLOT; ++i) {
      mbar_init(bar_full + 8 * i, 1);
      mbar_init(bar_empty + 8 * i, MC ? 8 : 4);  // 4 warps of one warpgroup (in both CTAs)
    }
    mbar_init(bar_q, 1);
    mbar_init(bar_qe, 8);
    for (int i = 0; i < 2; ++i) {
      mbar_init(bar_tile + 8 * i, 1);
      mbar_init(bar_tile_e + 8 * i, 2 * 11);  // 3 loaders and 8 consumer warps in each CTA of the pair
    }
    mbar_init(bar_req, 1);
    for (int i = 0; i < 4; ++i) mbar_init(bar_peer + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async();
  }
  __syncthreads();
  cluster_sync();

  int f = 0;  // tile numbers read so far
  const uint32_t tile_e0 = mapa(bar_tile_e, 0);
  auto read_tile = [&](bool warp) -> int {  // by one thread, or by a whole warp
    const int slot = f & 1;
    mbar_wait_cluster(bar_tile + 8 * slot, (f >> 1) & 1);
    const int t = (int)ld_shared(tile_no + 4 * slot);
    if (warp) __syncwarp();
    if (!warp || lane == 0) mbar_arrive_cluster(tile_e0 + 8 * slot);
    ++f;
    return t;
  };

  if (wg == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int w = threadIdx.x >> 5;
    if (w < 2 && lane == 0) {  // one ring
      const uint32_t full = bar_full + w * NSLOT * 8, empty = bar_empty + w * NSLOT * 8,
                     ring = base + OFF_RING + w * NSLOT * SLOT + (MC ? rank * (SLOT / 2) : 0);
      const bool asks = rank == 0 && w == 0;
      uint32_t nb = 0;  // batches of 8 slots already requested on this ring
      int b = 0, hk = 0, qend = 0, trig = 0;
      Walk<NS> k = {};
      auto fetch = [&]() -> bool {
        for (;;) {
          const int t = read_tile(false);
          if (t >= p.n_tiles) return false;
          const Tile x = decode(p, t, rank);
          b = x.b;
          hk = x.h / p.G;
          qend = x.qend;
          k.start(g, p.n_seg, qend);
          if (k.left > 0) break;
          if (asks) mbar_arrive(bar_req);
        }
        trig = min(k.left - 1, 3);  // ask for the next tile when this many blocks are still to come
        return true;
      };
      auto step = [&]() {
        k.next(g, qend);
        if (asks && k.left == trig) mbar_arrive(bar_req);
      };
      uint32_t n_meet = 0;
      const uint32_t meet = bar_peer + 16 * w, peer = mapa(meet, rank ^ 1);
      auto load_k = [&]() {
#pragma unroll 1
        for (int s = 0; s < 8; ++s) {
          mbar_wait(empty + 8 * s, (nb & 1) ^ 1);
          if (!MC && s == 0) {
            // load the same keys at the same time: the L2 request coalescer then answers both CTAs with one read
            mbar_arrive_remote(peer + 8 * (n_meet & 1));
            mbar_wait(meet + 8 * (n_meet & 1), (n_meet >> 1) & 1);
            ++n_meet;
          }
          mbar_expect(full + 8 * s, SLOT);
          tma_load_kv<MC>(ring + s * SLOT, &g.map[2 * k.s], full + 8 * s, k.j * BN + w * 64 + (MC ? rank * 32 : 0), s, hk, b);
        }
        ++nb;
      };
      auto load_v = [&](int seg, int j, int hk, int b) {
#pragma unroll 1
        for (int s = 0; s < 8; ++s) {
          const int blk = s < 4 ? w : 1 - w;
          mbar_wait(empty + 8 * s, (nb & 1) ^ 1);
          mbar_expect(full + 8 * s, SLOT);
          tma_load_kv<MC>(ring + s * SLOT, &g.map[2 * seg + 1], full + 8 * s, j * BN + blk * 64 + (s & 3) * 16,
                      4 * w + (MC ? rank * 2 : 0), hk, b);
        }
        ++nb;
      };
      if (fetch()) {
        step();
        load_k();
        bool more;
        do {
          const int seg0 = k.s, j0 = k.j, hk0 = hk, b0 = b;
          more = k.left > 0 || fetch();
          if (more) {
            step();
            load_k();
          }
          load_v(seg0, j0, hk0, b0);
        } while (more);
      }
    } else if (w == 2) {  // Q; previous results into the L2
      uint32_t n = 0;
      for (;;) {
        const int t = read_tile(true);
        if (t >= p.n_tiles) break;
        const Tile x = decode(p, t, rank);
        Walk<NS> k;
        k.start(g, p.n_seg, x.qend);
        if (k.left <= 0) continue;
        if (lane == 0) {
          mbar_wait(bar_qe, (n & 1) ^ 1);
          mbar_expect(bar_q, BM * D * 2);
          tma_load(base, &tmQ, bar_q, x.rows > 0 ? x.row : x.row - BM, 0, x.h, x.b);  // no rows: any will do
        }
        __syncwarp();
        ++n;
        if (p.po) {
          const int es = p.prev32 ? 4 : 2;
          for (int r = lane; r < min(BM, x.rows); r += 32) {
            const char* a = (const char*)p.po + (x.b * p.po_b + (x.row + r) * p.po_m + x.h * p.po_h) * es;
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(a)), "r"(D * es)
                         : "memory");
          }
        }
      }
    } else if (w == 3 && lane == 0 && rank == 0) {  // tile numbers for the pair
      const int n_cl = gridDim.x >> 1;
      int t = blockIdx.x >> 1;
      for (int i = 0;; ++i) {
        if (i > 0) {
          mbar_wait(bar_req, (i - 1) & 1);
          t = atomicAdd(p.counter, 1) + n_cl;
        }
        mbar_wait_cluster(bar_tile_e + 8 * (i & 1), ((i >> 1) & 1) ^ 1);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          st_cluster(mapa(tile_no + 4 * (i & 1), c), (uint32_t)t);
          mbar_arrive_cluster(mapa(bar_tile + 8 * (i & 1), c));
        }
        if (t >= p.n_tiles) break;
      }
      __threadfence();
      if (atomicAdd(p.counter + 1, 1) == n_cl - 1) {  // last one: leave the counters zeroed
        p.counter[0] = 0;
        p.counter[1] = 0;
      }
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int w = wg - 1, warp = (threadIdx.x >> 5) & 3, quad = lane & 3;
    const int row0 = warp * 16 + (lane >> 2);  // this thread's rows: row0 and row0 + 8
    const uint32_t full = bar_full + w * NSLOT * 8;
    const uint32_t empty = MC ? mapa(bar_empty + w * NSLOT * 8, lane & 1) : bar_empty + w * NSLOT * 8;
    const uint32_t dq = desc(base, 16), dk = desc(base + OFF_RING + w * NSLOT * SLOT, 16),
                   dv = desc(base + OFF_RING + w * NSLOT * SLOT, 2048), dp = desc(base + OFF_P, 16);
    float* smax = (float*)(smem_raw + (base - smem_u32(smem_raw)) + OFF_MAX);  // [2 buffers][2 blocks][64]
    float* ssum = smax + 256;                                                  // [2 warpgroups][64]
    float O[128], S[32];
#pragma unroll
    for (int i = 0; i < 128; ++i) O[i] = 0.f;
#pragma unroll
    for (int i = 0; i < 32; ++i) S[i] = 0.f;
    float m_a = -INFINITY, m_b = -INFINITY, l_a = 0.f, l_b = 0.f, al_a = 1.f, al_b = 1.f;
    Tile x = {};
    Walk<NS> k = {};
    uint32_t n_q = 0;            // query tiles taken so far
    int c0 = 0, len = 0, shift = 0;  // of block k: first key of this warpgroup, number of keys, last key that row 0 sees

    auto release = [&](int s) {
      if (!MC) {
        if (lane == 0) mbar_arrive(empty + 8 * s);
      } else if (lane < 2) {
        mbar_arrive_remote(empty + 8 * s);
      }
    };
    auto empty_tile = [&]() {  // rows that see no key
      const bool in_place = p.po == p.o;
      const int rows = min(BM, x.rows);
      for (int i = threadIdx.x - 128; i < rows * D; i += 256) {
        const int r = x.row + i / D, c = i % D;
        float v = 0.f;
        if (p.po && p.plse[x.b * p.plse_b + x.h * p.plse_h + r] != -INFINITY) {
          if (in_place) continue;
          const long long a = x.b * p.po_b + r * p.po_m + x.h * p.po_h + c;
          v = p.prev32 ? ((const float*)p.po)[a] : widen(((const T*)p.po)[a]);
        }
        const long long a = x.b * p.o_b + r * p.o_m + x.h * p.o_h + c;
        if (p.out32)
          ((float*)p.o)[a] = v;
        else
          ((T*)p.o)[a] = narrow<T>(v);
      }
      bar_sync(5, 256);  // lse may be merged in place: write it after everyone has read it
      for (int r = x.row + threadIdx.x - 128; r < x.row + rows; r += 256)
        p.lse[x.b * p.lse_b + x.h * p.lse_h + r] = p.po ? p.plse[x.b * p.plse_b + x.h * p.plse_h + r] : -INFINITY;
    };
    auto fetch = [&]() -> bool {
      for (;;) {
        const int t = __shfl_sync(0xffffffffu, read_tile(true), 0);  // warp-uniform for the compiler
        if (t >= p.n_tiles) return false;
        x = decode(p, t, rank);
        k.start(g, p.n_seg, x.qend);
        if (k.left > 0) return true;
        empty_tile();
      }
    };
    auto issue_qk = [&](int s, uint32_t parity) {  // descriptor units are 16 bytes
      mbar_wait(full + 8 * s, parity);
      wg_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk)
        Mma<T>::qk(S, dq + s * (8192 / 16) + kk * 2, dk + s * (SLOT / 16) + kk * 2, s > 0 || kk > 0);
      wg_commit();
    };
    auto issue_pv = [&](int s, uint32_t parity, int buf) {
      const int blk = s < 4 ? w : 1 - w;
      mbar_wait(full + 8 * s, parity);
      wg_fence();
      Mma<T>::pv(O, dp + (buf * 2 + blk) * (8192 / 16) + (s & 3) * 2, dv + s * (SLOT / 16), 1);
      wg_commit();
    };
    auto rescale = [&]() {
      if (__any_sync(0xffffffffu, al_a != 1.f || al_b != 1.f)) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          O[4 * i] *= al_a;
          O[4 * i + 1] *= al_a;
          O[4 * i + 2] *= al_b;
          O[4 * i + 3] *= al_b;
        }
      }
    };
    auto row_max = [&](int buf) {  // mask block k, then its row maxima into shared memory
      if (c0 + 64 > len || c0 + 63 > shift) {
        const int lim_a = min(len, row0 + shift + 1), lim_b = min(len, row0 + 8 + shift + 1), c = c0 + quad * 2;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (c + 8 * j >= lim_a) S[4 * j] = -INFINITY;
          if (c + 8 * j + 1 >= lim_a) S[4 * j + 1] = -INFINITY;
          if (c + 8 * j >= lim_b) S[4 * j + 2] = -INFINITY;
          if (c + 8 * j + 1 >= lim_b) S[4 * j + 3] = -INFINITY;
        }
      }
      float u = -INFINITY, v = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        u = fmaxf(u, fmaxf(S[4 * j], S[4 * j + 1]));
        v = fmaxf(v, fmaxf(S[4 * j + 2], S[4 * j + 3]));
      }
      u = fmaxf(u, __shfl_xor_sync(0xffffffffu, u, 1));
      v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
      u = fmaxf(u, __shfl_xor_sync(0xffffffffu, u, 2));
      v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
      float* mine = smax + (buf * 2 + w) * 64 + row0;
      const float* other = smax + (buf * 2 + 1 - w) * 64 + row0;
      if (quad == 0) {
        mine[0] = u;
        mine[8] = v;
      }
      bar_sync(1, 256);
      u = fmaxf(u, other[0]);
      v = fmaxf(v, other[8]);
      // both warpgroups see the same maxima, so both take the same decision
      auto step = [&](float& m, float v, float& al) {
        al = 1.f;
        if (m == -INFINITY) {
          m = v;  // nothing accumulated yet
        } else if ((v - m) * p.scale_log2 > RESCALE_TAU) {
          al = ex2((m - v) * p.scale_log2);
          m = v;
        }
      };
      step(m_a, u, al_a);
      step(m_b, v, al_b);
    };
    auto exp_p = [&](int buf) {  // P = 2^(S - m) in T into shared memory, row sums into l
      const float na = m_a == -INFINITY ? 0.f : -m_a * p.scale_log2, nb = m_b == -INFINITY ? 0.f : -m_b * p.scale_log2;
      const uint32_t tile = base + OFF_P + (buf * 2 + w) * 8192 + row0 * 128 + quad * 4;
      const uint32_t sw = lane >> 2;  // row0 & 7 == (row0 + 8) & 7
      float sa = 0.f, sb = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float e0 = ex2(fmaf(S[4 * j], p.scale_log2, na)), e1 = ex2(fmaf(S[4 * j + 1], p.scale_log2, na));
        const float e2 = ex2(fmaf(S[4 * j + 2], p.scale_log2, nb)), e3 = ex2(fmaf(S[4 * j + 3], p.scale_log2, nb));
        sa += e0 + e1;
        sb += e2 + e3;
        const uint32_t a = tile + ((j ^ sw) << 4);
        st_shared(a, pack<T>(e0, e1));
        st_shared(a + 1024, pack<T>(e2, e3));
      }
      l_a = l_a * al_a + sa;
      l_b = l_b * al_b + sb;
      fence_async();
    };
    auto next_block = [&]() {
      k.next(g, x.qend);
      c0 = k.j * BN + w * 64;
      len = g.len[k.s];
      shift = x.gq - g.off[k.s];
    };
    auto q_done = [&]() {  // the scores of this tile's last block have retired: Q may be overwritten
      if (k.left == 0 && lane == 0) mbar_arrive(bar_qe);
    };

    if (fetch()) {
      next_block();
      mbar_wait(bar_q, 0);
      ++n_q;
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        issue_qk(s, 0);
        if (s > 0) {
          wg_wait<1>();
          release(s - 1);
        }
      }
      wg_wait<0>();
      release(7);
      q_done();
      keep(S);
      row_max(0);
      exp_p(0);

      bool more, last = k.left == 0;  // the block whose P is ready ends its tile
      int buf = 0;
      if (!last) next_block();  // from here on k is the block after it
#pragma unroll 1
      do {
        bool last_next = true;
        const int eb = x.b, eh = x.h, erow = x.row, erows = x.rows;
        float em_a = m_a, em_b = m_b, el_a = l_a, el_b = l_b;
        more = true;
        if (last) {
          more = fetch();
          if (more) {
            next_block();
            mbar_wait(bar_q, n_q & 1);
            ++n_q;
          }
        }
        if (more) {
          issue_qk(0, 1);  // scores of the next block pair
          issue_qk(1, 1);
          wg_wait<1>();
          release(0);
          issue_qk(2, 1);
          keep(O);
          rescale();
          keep(O);
          wg_wait<1>();
          release(1);
#pragma unroll
          for (int s = 3; s < 8; ++s) {
            issue_qk(s, 1);
            wg_wait<1>();
            release(s - 1);
          }
          bar_sync(2, 256);  // both P tiles of this pair are written
          issue_pv(0, 0, buf);
          issue_pv(1, 0, buf);
          issue_pv(2, 0, buf);
          issue_pv(3, 0, buf);
          wg_wait<4>();
          release(7);
          q_done();
          keep(S);
          if (last) {
            m_a = m_b = -INFINITY;
            l_a = l_b = 0.f;
          }
          row_max(buf ^ 1);
          wg_wait<2>();
          release(0);
          release(1);
          issue_pv(4, 0, buf);
          issue_pv(5, 0, buf);
          exp_p(buf ^ 1);
          wg_wait<2>();
          release(2);
          release(3);
          issue_pv(6, 0, buf);
          issue_pv(7, 0, buf);
          last_next = k.left == 0;
          if (!last_next) next_block();  // here, not at the top, where the tensor cores would wait for it
          wg_wait<2>();
          release(4);
          release(5);
          // everything retires before the back edge: with products in flight across it ptxas serializes all of them
          wg_wait<0>();
          release(6);
          release(7);
          keep(O);
        } else {
          rescale();
          keep(O);
          bar_sync(2, 256);
#pragma unroll
          for (int s = 0; s < 8; ++s) issue_pv(s, 1, buf);
          wg_wait<0>();
          keep(O);
        }
        buf ^= 1;
        if (last) {  // write the tile
          const bool va = row0 < erows, vb = row0 + 8 < erows;
          el_a += __shfl_xor_sync(0xffffffffu, el_a, 1);
          el_b += __shfl_xor_sync(0xffffffffu, el_b, 1);
          el_a += __shfl_xor_sync(0xffffffffu, el_a, 2);
          el_b += __shfl_xor_sync(0xffffffffu, el_b, 2);
          if (quad == 0) {
            ssum[w * 64 + row0] = el_a;
            ssum[w * 64 + row0 + 8] = el_b;
          }
          float pl_a = -INFINITY, pl_b = -INFINITY;
          if (p.po) {
            const float* q = p.plse + eb * p.plse_b + eh * p.plse_h + erow + row0;
            if (va) pl_a = q[0];
            if (vb) pl_b = q[8];
          }
          bar_sync(5, 256);  // row sums are shared, previous lse is read
          el_a += ssum[(1 - w) * 64 + row0];
          el_b += ssum[(1 - w) * 64 + row0 + 8];
          float ca = el_a == 0.f ? 0.f : 1.f / el_a, cb = el_b == 0.f ? 0.f : 1.f / el_b, wa = 0.f, wb = 0.f;
          float lse_a = el_a == 0.f ? -INFINITY : em_a * p.scale + logf(el_a);
          float lse_b = el_b == 0.f ? -INFINITY : em_b * p.scale + logf(el_b);
          if (p.po) {
            lse_a = merge_weights(lse_a, pl_a, ca, wa);
            lse_b = merge_weights(lse_b, pl_b, cb, wb);
          }
          if (w == 0 && quad == 0) {
            float* q = p.lse + eb * p.lse_b + eh * p.lse_h + erow + row0;
            if (va) q[0] = lse_a;
            if (vb) q[8] = lse_b;
          }
          const long long oo = eb * p.o_b + (erow + row0) * p.o_m + eh * p.o_h + w * 256;
          const long long pp = eb * p.po_b + (erow + row0) * p.po_m + eh * p.po_h + w * 256;
          if (!va) wa = 0.f;  // and never read rows that do not exist
          if (!vb) wb = 0.f;
          float* of = (float*)p.o + oo;
          T* ot = (T*)p.o + oo;
          const float* pf = (const float*)p.po + pp;
          const T* pt = (const T*)p.po + pp;
          if (!p.po) {
            if (p.out32)
              store_tile<T, float, float, false>(O, of, of + 8 * p.o_m, pf, pf, ca, cb, 0.f, 0.f, va, vb, quad);
            else
              store_tile<T, T, float, false>(O, ot, ot + 8 * p.o_m, pf, pf, ca, cb, 0.f, 0.f, va, vb, quad);
          } else if (p.prev32) {
            if (p.out32)
              store_tile<T, float, float, true>(O, of, of + 8 * p.o_m, pf, pf + 8 * p.po_m, ca, cb, wa, wb, va, vb, quad);
            else
              store_tile<T, T, float, true>(O, ot, ot + 8 * p.o_m, pf, pf + 8 * p.po_m, ca, cb, wa, wb, va, vb, quad);
          } else {
            if (p.out32)
              store_tile<T, float, T, true>(O, of, of + 8 * p.o_m, pt, pt + 8 * p.po_m, ca, cb, wa, wb, va, vb, quad);
            else
              store_tile<T, T, T, true>(O, ot, ot + 8 * p.o_m, pt, pt + 8 * p.po_m, ca, cb, wa, wb, va, vb, quad);
          }
#pragma unroll
          for (int i = 0; i < 128; ++i) O[i] = 0.f;
        }
        last = last_next;
      } while (more);
    }
    __syncwarp();
  }
  cluster_sync();  // the other CTA may still arrive on our barriers
}

namespace {

typedef CUresult (*EncodeFn)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                             const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeFn encode_fn() {
  static EncodeFn fn = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult st;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &st) != cudaSuccess ||
        st != cudaDriverEntryPointSuccess)
      f = nullptr;
    return (EncodeFn)f;
  }();
  return fn;
}

// [B, L, H, 512] as the 5-dimensional tensor (64 dims, L, 8 chunks, H, B)
int make_map(CUtensorMap* m, const void* ptr, bool bf16, int B, int L, int H, const long long* st, int rows, int chunks) {
  cuuint64_t dim[5] = {64, (cuuint64_t)L, 8, (cuuint64_t)H, (cuuint64_t)B};
  cuuint64_t str[4] = {(cuuint64_t)st[1] * 2, 128, (cuuint64_t)st[2] * 2, (cuuint64_t)st[0] * 2};
  cuuint32_t box[5] = {64, (cuuint32_t)rows, (cuuint32_t)chunks, 1, 1}, es[5] = {1, 1, 1, 1, 1};
  EncodeFn f = encode_fn();
  if (!f) return 999;
  return (int)f(m, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, (void*)ptr, dim, str,
                box, es, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

struct Args {  // mirrored by ds_ring/kernels/attention512.py
  const void* q;
  void* o;
  float* lse;
  const void* po;
  const float* plse;
  int* counter;
  void* stream;
  long long st_q[3], st_o[3], st_lse[2], st_po[3], st_plse[2];  // batch, seq, head (batch, head for lse)
  int B, Hq, Hkv, Lq, n_seg, n_chunk, causal, bf16, out32, prev32, max_ctas, multicast;
  float scale;
  const void *k[64], *v[64];
  long long st_k[64][3], st_v[64][3];
  int len[64], koff[64];
  int q_row[MAXQ], q_len[MAXQ], q_off[MAXQ];
};

template <typename T, int NS, bool MC>
int launch(const Args& a, const Params& p, const CUtensorMap& mq, int grid) {
  auto kern = attention512<T, NS, MC>;
  static cudaError_t attr = cudaFuncSetAttribute(kern, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_REQ);
  if (attr != cudaSuccess) return (int)attr;
  Segs<NS> g;
  for (int i = 0; i < a.n_seg; ++i) {
    int e = make_map(&g.map[2 * i], a.k[i], a.bf16, a.B, a.len[i], a.Hkv, a.st_k[i], MC ? 32 : 64, 1);
    if (!e) e = make_map(&g.map[2 * i + 1], a.v[i], a.bf16, a.B, a.len[i], a.Hkv, a.st_v[i], 16, MC ? 2 : 4);
    if (e) return 10000 + e;
    g.len[i] = a.len[i];
    g.off[i] = a.causal ? a.koff[i] : 0;
  }
  cudaLaunchConfig_t c = {};
  c.gridDim = dim3(grid);
  c.blockDim = dim3(384);
  c.dynamicSmemBytes = SMEM_REQ;
  c.stream = (cudaStream_t)a.stream;
  cudaLaunchAttribute at[1];
  at[0].id = cudaLaunchAttributeClusterDimension;
  at[0].val.clusterDim.x = 2;
  at[0].val.clusterDim.y = 1;
  at[0].val.clusterDim.z = 1;
  c.attrs = at;
  c.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&c, kern, mq, g, p);
}

template <typename T>
int launch_t(const Args& a, const Params& p, const CUtensorMap& mq, int grid) {
  if (a.n_seg <= 4) return a.multicast ? launch<T, 4, true>(a, p, mq, grid) : launch<T, 4, false>(a, p, mq, grid);
  return a.multicast ? launch<T, 64, true>(a, p, mq, grid) : launch<T, 64, false>(a, p, mq, grid);
}


}  // namespace
}  // namespace ds_ring

extern "C" int attention512_args_size() { return (int)sizeof(ds_ring::Args); }

// Returns 0, a cudaError_t, or 10000 + CUresult when a tensor map could not be made.
extern "C" int attention512_forward(const void* args) {  // an Args
  using namespace ds_ring;
  const Args& a = *(const Args*)args;
  CUtensorMap mq;
  int e;
  if ((e = make_map(&mq, a.q, a.bf16, a.B, a.Lq, a.Hq, a.st_q, BM, 8))) return 10000 + e;
  Params p;
  p.o = a.o;
  p.lse = a.lse;
  p.po = a.po;
  p.plse = a.plse;
  p.counter = a.counter;
  p.o_b = a.st_o[0], p.o_m = a.st_o[1], p.o_h = a.st_o[2];
  p.lse_b = a.st_lse[0], p.lse_h = a.st_lse[1];
  p.po_b = a.st_po[0], p.po_m = a.st_po[1], p.po_h = a.st_po[2];
  p.plse_b = a.st_plse[0], p.plse_h = a.st_plse[1];
  p.Hq = a.Hq;
  p.G = a.Hq / a.Hkv;
  p.n_seg = a.n_seg;
  p.n_pairs = 0;
  for (int i = 0; i < a.n_chunk; ++i) {
    p.q_row[i] = a.q_row[i];
    p.q_len[i] = a.q_len[i];
    p.q_off[i] = a.causal ? a.q_off[i] : 1 << 29;
    p.q_pairs[i] = (a.q_len[i] + 2 * BM - 1) / (2 * BM);
    p.n_pairs += p.q_pairs[i];
  }
  p.n_tiles = p.n_pairs * a.Hq * a.B;
  p.reverse = a.causal;
  p.out32 = a.out32;
  p.prev32 = a.prev32;
  p.scale = a.scale;
  p.scale_log2 = a.scale * 1.4426950408889634f;
  const int pairs = a.max_ctas / 2, grid = 2 * (p.n_tiles < pairs ? p.n_tiles : pairs);
  return a.bf16 ? launch_t<__nv_bfloat16>(a, p, mq, grid) : launch_t<__half>(a, p, mq, grid);
}
