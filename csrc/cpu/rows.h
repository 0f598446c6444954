// One row of logits, a stretch of the vocabulary at a time: statistics on the way forward, gradient on the way back.
//
// Formulas are those of flow_kernels/reference.py. A stretch is fp32, `n` logits followed by padding up to a multiple
// of the vector width; padding is -inf as a logit and 0 as an exponential or a gradient.
#pragma once
#include <math.h>

#include "api.h"

namespace flow_kernels {
namespace FLOW_ISA {

using F = Vec::F;
using I = Vec::I;
constexpr int W = Vec::W;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// exp within 1 ulp (Cephes' polynomial on [-ln2/2, ln2/2]); NaN stays NaN.
static inline F exp_(F x) {
  const F bounded = Vec::min(Vec::set1(88.3f), Vec::max(Vec::set1(Vec::exp_lowest), x));
  const F n = Vec::round(Vec::mul(bounded, Vec::set1(1.44269504088896341f)));
  F r = Vec::fnma(n, Vec::set1(0.693359375f), bounded);
  r = Vec::fnma(n, Vec::set1(-2.12194440e-4f), r);
  F p = Vec::set1(1.9875691500e-4f);
  p = Vec::fma(p, r, Vec::set1(1.3981999507e-3f));
  p = Vec::fma(p, r, Vec::set1(8.3334519073e-3f));
  p = Vec::fma(p, r, Vec::set1(4.1665795894e-2f));
  p = Vec::fma(p, r, Vec::set1(1.6666665459e-1f));
  p = Vec::fma(p, r, Vec::set1(5.0000001201e-1f));
  p = Vec::fma(p, Vec::mul(r, r), Vec::add(r, Vec::set1(1.0f)));
  return Vec::flush(Vec::scale(p, n), x);
}

// tanh within a few ulp, also near 0, where 1 - 2 / (exp(2x) + 1) would cancel (Eigen's rational approximation).
static inline F tanh_(F x) {
  x = Vec::min(Vec::set1(7.90531110763549805f), Vec::max(Vec::set1(-7.90531110763549805f), x));
  const F x2 = Vec::mul(x, x);
  F p = Vec::set1(-2.76076847742355e-16f);
  p = Vec::fma(p, x2, Vec::set1(2.00018790482477e-13f));
  p = Vec::fma(p, x2, Vec::set1(-8.60467152213735e-11f));
  p = Vec::fma(p, x2, Vec::set1(5.12229709037114e-08f));
  p = Vec::fma(p, x2, Vec::set1(1.48572235717979e-05f));
  p = Vec::fma(p, x2, Vec::set1(6.37261928875436e-04f));
  p = Vec::fma(p, x2, Vec::set1(4.89352455891786e-03f));
  F q = Vec::set1(1.19825839466702e-06f);
  q = Vec::fma(q, x2, Vec::set1(1.18534705686654e-04f));
  q = Vec::fma(q, x2, Vec::set1(2.26843463243900e-03f));
  q = Vec::fma(q, x2, Vec::set1(4.89352518554385e-03f));
  return Vec::div(Vec::mul(x, p), q);
}

// Raw products to logits: bias, soft-cap, and -inf as padding.
static inline void finish_logits(float* z, int64_t n, const float* bias, float softcap) {
  const int64_t padded = round_up(n, W);
  if (bias != nullptr) {
    int64_t j = 0;
    for (; j + W <= n; j += W) Vec::store(z + j, Vec::add(Vec::load(z + j), Vec::load(bias + j)));
    for (; j < n; ++j) z[j] += bias[j];
  }
  for (int64_t j = n; j < padded; ++j) z[j] = -INFINITY;
  if (softcap > 0) {
    const F cap = Vec::set1(softcap), inverse = Vec::set1(1.0f / softcap);
    for (int64_t j = 0; j < padded; j += W) {
      Vec::store(z + j, Vec::mul(cap, tanh_(Vec::mul(Vec::load(z + j), inverse))));
    }
    for (int64_t j = n; j < padded; ++j) z[j] = -INFINITY;
  }
}

static inline float max_of(const float* z, int64_t n) {
  float largest = -INFINITY;
  int64_t j = 0;
  if (n >= W) {
    F m = Vec::load(z);
    for (j = W; j + W <= n; j += W) m = Vec::max(m, Vec::load(z + j));
    largest = Vec::hmax(m);
  }
  for (; j < n; ++j) largest = z[j] > largest ? z[j] : largest;
  return largest;
}

// How an exponential is kept: as fp32, as fp16 times 2^15 (relative error 2^-11 down to 2e-9 of the largest, far below
// bf16's 2^-8), or as a byte, the root of its ratio to the largest of its row and tile: exact for the largest, relative
// error at most 2^-8 sqrt(largest / it), so that what matters within a tile is kept nearly as well as bf16 keeps it.
constexpr float kept_scale = 32768.0f;
constexpr float kept_steps = 255.0f;

// sum of exp(z - shift), stored in `kept` (if any) in `bytes`.
static inline float sum_of_exponentials(const float* z, int64_t padded, float shift, void* kept, int bytes) {
  const F vshift = Vec::set1(shift);
  F sum0 = Vec::zero(), sum1 = Vec::zero();
  if (kept == nullptr) {
    int64_t j = 0;
    for (; j + 2 * W <= padded; j += 2 * W) {
      sum0 = Vec::add(sum0, exp_(Vec::sub(Vec::load(z + j), vshift)));
      sum1 = Vec::add(sum1, exp_(Vec::sub(Vec::load(z + j + W), vshift)));
    }
    if (j < padded) sum0 = Vec::add(sum0, exp_(Vec::sub(Vec::load(z + j), vshift)));
  } else if (bytes == 1) {
    uint8_t* out = static_cast<uint8_t*>(kept);
    for (int64_t j = 0; j < padded; j += W) {
      const F root = exp_(Vec::mul(Vec::sub(Vec::load(z + j), vshift), Vec::set1(0.5f)));
      sum0 = Vec::fma(root, root, sum0);
      Vec::store_u8(out + j, Vec::mul(root, Vec::set1(kept_steps)));
    }
  } else if (bytes == 2) {
    uint16_t* out = static_cast<uint16_t*>(kept);
    for (int64_t j = 0; j < padded; j += W) {
      const F e = exp_(Vec::sub(Vec::load(z + j), vshift));
      sum0 = Vec::add(sum0, e);
      Vec::store_f16(out + j, Vec::mul(e, Vec::set1(kept_scale)));
    }
  } else {
    float* out = static_cast<float*>(kept);
    for (int64_t j = 0; j < padded; j += W) {
      const F e = exp_(Vec::sub(Vec::load(z + j), vshift));
      sum0 = Vec::add(sum0, e);
      Vec::store(out + j, e);
    }
  }
  return Vec::hsum(Vec::add(sum0, sum1));
}

struct Sums {
  float sum, product;
};

// sums of e = exp(z - shift) and of e (z - shift).
static inline Sums sums_for_entropy(const float* z, int64_t padded, float shift) {
  // Where e is 0 its product is to be 0 as well, and not 0 times -inf.
  const F vshift = Vec::set1(shift), lowest = Vec::set1(Vec::exp_lowest);
  F sum = Vec::zero(), product = Vec::zero();
  for (int64_t j = 0; j < padded; j += W) {
    const F difference = Vec::sub(Vec::load(z + j), vshift), e = exp_(difference);
    sum = Vec::add(sum, e);
    product = Vec::fma(e, Vec::max(difference, lowest), product);
  }
  return {Vec::hsum(sum), Vec::hsum(product)};
}

static inline float weighted_sum(const float* z, int64_t n, const float* class_weight) {
  F sum = Vec::zero();
  float tail = 0;
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const F zj = Vec::load(z + j);
    sum = class_weight == nullptr ? Vec::add(sum, zj) : Vec::fma(Vec::load(class_weight + j), zj, sum);
  }
  for (; j < n; ++j) tail += class_weight == nullptr ? z[j] : class_weight[j] * z[j];
  return Vec::hsum(sum) + tail;
}

// Add logits z[0:n] to the row's statistics, except the target's (at t, where it is among them), which becomes -inf; so
// what is left of a confident row, the sum of the others, is not the difference of two numbers near 1.
// If `kept` is given, store exp(z - shift) there (bytes 1, 2 or 4) and return the shift: -inf where all there is so far is
// -inf, since 0 times exp(shift - lse) is to be 0 however low the lse is.
static inline float add_to_stats(float* z, int64_t n, int64_t t, const float* class_weight, const LossOptions& loss,
                                 RowStats& stats, void* kept, int kept_bytes) {
  const int64_t padded = round_up(n, W);
  if (loss.label_smoothing > 0) stats.smooth += weighted_sum(z, n, class_weight);
  if (t >= 0 && t < n) z[t] = -INFINITY;
  const float largest = max_of(z, padded);
  // Comparisons with NaN are false, so a NaN reaches the sum below and never the maximum.
  const float new_max = largest > stats.max ? largest : stats.max;
  const float base = new_max == -INFINITY ? 0.0f : new_max;
  // Bytes reach 2^-16 only, from the largest of the tile; the others are good for the whole row.
  const float shift = kept != nullptr && kept_bytes == 1 && largest != -INFINITY ? largest : base;
  const float before = stats.max == new_max ? 1.0f : expf(stats.max - base);
  float sum;
  if (loss.need_entropy) {  // only where nothing is kept
    const Sums sums = sums_for_entropy(z, padded, shift);
    sum = sums.sum;
    const float moved = stats.max == -INFINITY ? 0.0f : stats.sum * (stats.max - base);
    // Where nothing is left of it, `moved` may be infinite: of a tile that is all one finite mask.
    stats.product = (before == 0.0f ? 0.0f : (stats.product + moved) * before) + sums.product;
  } else {
    sum = sum_of_exponentials(z, padded, shift, kept, kept_bytes);
  }
  stats.sum = stats.sum * before;
  stats.sum += shift == base ? sum : sum * expf(shift - base);
  stats.max = new_max;
  return new_max == -INFINITY ? -INFINITY : shift;
}

// The gradient of g * loss of one row, in terms of its target and lse.
struct RowGradient {
  double exact_lse;
  float g, hit, spread, lse;
  float scale;  // of exp(z - lse); makes good what the rounding of lse took
  int64_t target;

  RowGradient(const LossOptions& loss, float row_scale, double lse_, int64_t target_) {
    g = row_scale;
    exact_lse = lse_;
    lse = static_cast<float>(lse_);
    target = target_;
    hit = (1.0f - loss.label_smoothing) * (loss.class_weight == nullptr ? 1.0f : loss.class_weight[target_]);
    spread = hit + 2.0f * loss.z_loss * lse;
    if (loss.label_smoothing > 0) spread += loss.label_smoothing * loss.mean_class_weight;
    scale = g * spread * expf(static_cast<float>(lse - lse_));
  }
  // spread * p - hit, with p - 1 from expm1 so that it keeps its precision near p = 1.
  float at_target(float log_p) const { return g * ((spread - hit) * expf(log_p) + hit * expm1f(log_p)); }
};

// Logits a row function holds at a time.
constexpr int64_t max_stretch = 1024;

// d[0:n] = gradient of the logits [v0, v0 + n), in place of the logits, or (without a soft-cap) from `kept` exponentials
// and their maximum.
// log_p is the target's log-probability where it is known better than from z and lse.
static inline void row_gradient(float* d, int64_t n, int64_t v0, const LossOptions& loss, const RowGradient& row,
                                const float* log_p, const void* kept, int kept_bytes, float kept_max) {
  alignas(64) float cap_slope[max_stretch];
  const int64_t padded = round_up(n, W);
  const int64_t t = row.target - v0;
  const bool has_target = t >= 0 && t < n;
  const float target_logit = has_target && kept == nullptr ? d[t] : 0.0f;
  if (loss.softcap > 0) {
    const F inverse = Vec::set1(1.0f / loss.softcap), one = Vec::set1(1.0f);
    for (int64_t j = 0; j < padded; j += W) {
      const F ratio = Vec::mul(Vec::load(d + j), inverse);
      Vec::store(cap_slope + j, Vec::fnma(ratio, ratio, one));
    }
  }
  if (kept == nullptr) {
    const F vscale = Vec::set1(row.scale), lse = Vec::set1(row.lse);
    for (int64_t j = 0; j < padded; j += W) {
      Vec::store(d + j, Vec::mul(vscale, exp_(Vec::sub(Vec::load(d + j), lse))));
    }
  } else {
    const float factor = row.scale * expf(kept_max - row.lse);
    const F f32_factor = Vec::set1(factor), f16_factor = Vec::set1(factor / kept_scale);
    const F u8_factor = Vec::set1(factor / (kept_steps * kept_steps));
    for (int64_t j = 0; j < padded; j += W) {
      if (kept_bytes == 1) {
        const F root = Vec::load_u8(static_cast<const uint8_t*>(kept) + j);
        Vec::store(d + j, Vec::mul(Vec::mul(root, root), u8_factor));
      } else if (kept_bytes == 2) {
        Vec::store(d + j, Vec::mul(Vec::load_f16(static_cast<const uint16_t*>(kept) + j), f16_factor));
      } else {
        Vec::store(d + j, Vec::mul(Vec::load(static_cast<const float*>(kept) + j), f32_factor));
      }
    }
  }
  if (has_target) d[t] = row.at_target(log_p != nullptr ? *log_p : static_cast<float>(target_logit - row.exact_lse));
  if (loss.label_smoothing > 0) {
    const float shift = row.g * loss.label_smoothing / static_cast<float>(loss.num_classes);
    const F vshift = Vec::set1(shift);
    const float* weight = loss.class_weight == nullptr ? nullptr : loss.class_weight + v0;
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      const F dz = Vec::load(d + j);
      Vec::store(d + j, weight == nullptr ? Vec::sub(dz, vshift) : Vec::fnma(vshift, Vec::load(weight + j), dz));
    }
    for (; j < n; ++j) d[j] -= shift * (weight == nullptr ? 1.0f : weight[j]);
  }
  if (loss.softcap > 0) {
    for (int64_t j = 0; j < padded; j += W) {
      Vec::store(d + j, Vec::mul(Vec::load(d + j), Vec::load(cap_slope + j)));
    }
  }
  for (int64_t j = n; j < padded; ++j) d[j] = 0.0f;
}

}  // namespace FLOW_ISA
}  // namespace flow_kernels
