// exp, erf and the activation functions on vectors; relative errors near 1e-7 (exp), absolute 2e-7 (erf).
#pragma once

#include "program.h"
#include "vec.h"

namespace sparseworks {
namespace {

// exp(x): 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline Vec exponential(Vec x) {
  x = minimum(all(88.0f), maximum(all(-87.0f), x));
  const Vec shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to nearest in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec exponent = as<IntVec>(shifted) << 23;
  return as<Vec>(as<IntVec>(p) + exponent);
}

inline Vec absolute(Vec x) {
  return as<Vec>(as<IntVec>(x) & 0x7fffffff);
}

// Abramowitz & Stegun 7.1.26.
inline Vec error_function(Vec x) {
  const Vec a = absolute(x);
  const Vec t = 1.0f / (a * 0.3275911f + 1.0f);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec y = 1.0f - p * t * exponential(-a * a);
  const IntVec sign = as<IntVec>(x) & static_cast<int>(0x80000000);
  return as<Vec>(as<IntVec>(y) | sign);
}

inline Vec logistic(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

// `slope` is of a leaky ReLU, from 0 to 1; of an ELU, what it tends to.
template <Activation A>
inline Vec activate(Vec x, float slope = 0.0f) {
  if constexpr (A == Activation::kRelu) return maximum(Vec{}, x);
  if constexpr (A == Activation::kRelu6) return minimum(all(6.0f), maximum(Vec{}, x));
  if constexpr (A == Activation::kGelu)
    return x * 0.5f * (1.0f + error_function(x * 0.70710678118654752f));
  if constexpr (A == Activation::kGeluTanh)
    return x * logistic(1.5957691216057308f * (x + 0.044715f * x * x * x));
  if constexpr (A == Activation::kSilu) return x * logistic(x);
  if constexpr (A == Activation::kHardswish)
    return x * minimum(all(6.0f), maximum(Vec{}, x + 3.0f)) * (1.0f / 6.0f);
  if constexpr (A == Activation::kHardsigmoid)
    return minimum(all(6.0f), maximum(Vec{}, x + 3.0f)) * (1.0f / 6.0f);
  if constexpr (A == Activation::kSigmoid) return logistic(x);
  if constexpr (A == Activation::kTanh) return 2.0f * logistic(2.0f * x) - 1.0f;
  if constexpr (A == Activation::kLeakyRelu) return maximum(x, x * slope);
  if constexpr (A == Activation::kQuickGelu) return x * logistic(1.702f * x);
  if constexpr (A == Activation::kElu)
    return select(x > 0.0f, x, slope * (exponential(minimum(Vec{}, x)) - 1.0f));
  if constexpr (A == Activation::kMish) {  // x tanh(log(1 + e^x)) = x (n - 1) / (n + 1), n = (1 + e^x)^2
    const Vec e = exponential(minimum(all(20.0f), x)), n = e * (e + 2.0f);
    return x * (n / (n + 2.0f));
  }
  return x;
}

// Calls f with the activation as a compile-time constant.
template <typename F>
inline void with_activation(Activation a, F&& f) {
  switch (a) {
#define CASE(name) \
  case Activation::name: f(std::integral_constant<Activation, Activation::name>{}); break
    CASE(kNone);
    CASE(kRelu);
    CASE(kRelu6);
    CASE(kGelu);
    CASE(kGeluTanh);
    CASE(kSilu);
    CASE(kHardswish);
    CASE(kHardsigmoid);
    CASE(kSigmoid);
    CASE(kTanh);
    CASE(kLeakyRelu);
    CASE(kQuickGelu);
    CASE(kElu);
    CASE(kMish);
#undef CASE
  }
}

}  // namespace
}  // namespace sparseworks
