// Vectors that are wider than a register, as two halves each. The compiler keeps its own vectors of
// such a width in memory and copies them for every operation.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define SPARSEWORKS_INLINE inline __attribute__((always_inline))

namespace sparseworks {
namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 64;  // bytes
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

template <typename T, int N, bool One>
struct Choose;

// N numbers.
template <typename T, int N>
using Numbers = typename Choose<T, N, N * sizeof(T) <= kRegister>::type;

template <typename T, int N>
struct Choose<T, N, true> {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <typename T, int N>
struct Halved {
  Numbers<T, N / 2> low, high;
};

template <typename T, int N>
struct Choose<T, N, false> {
  using type = Halved<T, N>;
};

template <typename T>
using Same = std::common_type_t<T>;  // not deduced

#define SPARSEWORKS_OPERATOR(op)                                                                 \
  template <typename T, int N>                                                                   \
  SPARSEWORKS_INLINE auto operator op(const Halved<T, N>& a, const Halved<T, N>& b) {            \
    return joined(a.low op b.low, a.high op b.high);                                             \
  }                                                                                              \
  template <typename T, int N>                                                                   \
  SPARSEWORKS_INLINE auto operator op(const Halved<T, N>& a, Same<T> b) {                        \
    return joined(a.low op b, a.high op b);                                                      \
  }                                                                                              \
  template <typename T, int N>                                                                   \
  SPARSEWORKS_INLINE auto operator op(Same<T> a, const Halved<T, N>& b) {                        \
    return joined(a op b.low, a op b.high);                                                      \
  }

// The element and the number of elements of a vector.
template <typename V>
struct Of {
  using Element = std::decay_t<decltype(std::declval<V>()[0])>;
  static constexpr int count = sizeof(V) / sizeof(Element);
};
template <typename T, int N>
struct Of<Halved<T, N>> {
  using Element = T;
  static constexpr int count = N;
};

template <typename V>
SPARSEWORKS_INLINE auto joined(const V& low, const V& high) {
  return Halved<typename Of<V>::Element, 2 * Of<V>::count>{low, high};
}

SPARSEWORKS_OPERATOR(+)
SPARSEWORKS_OPERATOR(-)
SPARSEWORKS_OPERATOR(*)
SPARSEWORKS_OPERATOR(/)
SPARSEWORKS_OPERATOR(&)
SPARSEWORKS_OPERATOR(|)
SPARSEWORKS_OPERATOR(<<)
SPARSEWORKS_OPERATOR(>>)
SPARSEWORKS_OPERATOR(<)
SPARSEWORKS_OPERATOR(>)
SPARSEWORKS_OPERATOR(>=)
SPARSEWORKS_OPERATOR(!=)
#undef SPARSEWORKS_OPERATOR

template <typename T, int N>
SPARSEWORKS_INLINE Halved<T, N> operator-(const Halved<T, N>& a) {
  return {-a.low, -a.high};
}

template <typename T, int N, typename B>
SPARSEWORKS_INLINE Halved<T, N>& operator+=(Halved<T, N>& a, const B& b) {
  return a = a + b;
}
template <typename T, int N, typename B>
SPARSEWORKS_INLINE Halved<T, N>& operator*=(Halved<T, N>& a, const B& b) {
  return a = a * b;
}

// The same bits as numbers of another kind.
template <typename To, typename From>
SPARSEWORKS_INLINE To as(const From& v) {
  static_assert(sizeof(To) == sizeof(From));
  if constexpr (sizeof(To) <= kRegister) {
    return (To)v;
  } else {
    using Half = decltype(To::low);
    return {as<Half>(v.low), as<Half>(v.high)};
  }
}

// The same values as numbers of another kind, of any width.
template <typename To, typename From>
SPARSEWORKS_INLINE To converted(const From& v) {
  constexpr bool wide = sizeof(To) > kRegister;
  if constexpr (!wide && sizeof(From) <= kRegister) {
    return __builtin_convertvector(v, To);
  } else {
    using Half = Numbers<typename Of<To>::Element, Of<To>::count / 2>;
    using Rest = Numbers<typename Of<From>::Element, Of<From>::count / 2>;
    Rest part[2];
    __builtin_memcpy(part, &v, sizeof v);
    const Half made[2] = {converted<Half>(part[0]), converted<Half>(part[1])};
    To out;
    __builtin_memcpy(&out, made, sizeof out);
    return out;
  }
}

// `a` where `mask` is not zero, else `b`.
template <typename M, typename V>
SPARSEWORKS_INLINE V select(const M& mask, const V& a, const V& b) {
  if constexpr (sizeof(V) <= kRegister) {
    return mask ? a : b;
  } else {
    return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  }
}

// Memory need not be aligned.
template <typename V>
SPARSEWORKS_INLINE V loaded(const void* p) {
  V v;
  if constexpr (sizeof(V) <= kRegister) {
    __builtin_memcpy(&v, p, sizeof v);
  } else {
    using Half = decltype(V::low);
    v.low = loaded<Half>(p);
    v.high = loaded<Half>(static_cast<const char*>(p) + sizeof(Half));
  }
  return v;
}

template <typename V>
SPARSEWORKS_INLINE void stored(void* p, const V& v) {
  if constexpr (sizeof(V) <= kRegister) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
    stored(p, v.low);
    stored(static_cast<char*>(p) + sizeof v.low, v.high);
  }
}

// What is not a number comes through as the second one.
template <typename V>
SPARSEWORKS_INLINE V maximum(const V& a, const V& b) {
  if constexpr (sizeof(V) <= kRegister) return a > b ? a : b;
  else return {maximum(a.low, b.low), maximum(a.high, b.high)};
}
template <typename V>
SPARSEWORKS_INLINE V minimum(const V& a, const V& b) {
  if constexpr (sizeof(V) <= kRegister) return a < b ? a : b;
  else return {minimum(a.low, b.low), minimum(a.high, b.high)};
}

// Numbers first, first + step, ... of a and then b, which fit a register.
template <int First, int Step, typename V, int... I>
SPARSEWORKS_INLINE V taken(const V& a, const V& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (First + Step * I)...);
#else
  const Numbers<int32_t, sizeof...(I)> at = {(First + Step * I)...};
  return __builtin_shuffle(a, b, at);
#endif
}
template <typename V>
using Places = std::make_integer_sequence<int, Of<V>::count>;

// Every second number of a, then of b.
template <typename V>
SPARSEWORKS_INLINE V evens(const V& a, const V& b) {
  if constexpr (sizeof(V) <= kRegister) return taken<0, 2>(a, b, Places<V>{});
  else return {evens(a.low, a.high), evens(b.low, b.high)};
}

// The numbers of a from the second one on, then the first one of b.
template <typename V>
SPARSEWORKS_INLINE V next(const V& a, const V& b) {
  if constexpr (sizeof(V) <= kRegister) return taken<1, 1>(a, b, Places<V>{});
  else return {next(a.low, a.high), next(a.high, b.low)};
}

// The last number of a, then those of b but for its last one.
template <typename V>
SPARSEWORKS_INLINE V previous(const V& a, const V& b) {
  if constexpr (sizeof(V) <= kRegister) return taken<Of<V>::count - 1, 1>(a, b, Places<V>{});
  else return {previous(a.high, b.low), previous(b.low, b.high)};
}

}  // namespace
}  // namespace sparseworks
