/* What the compiled core does to elements: reductions in rank order, keys of ordered floats.

   The same bits as NumPy's: operands keep their order, integers wrap, MIN and MAX of floats go by
   integers in the floats' order (arrays/dtypes.py says why). */
#ifndef MPICOLL_KERNELS_H
#define MPICOLL_KERNELS_H

#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONED __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#else
#define CLONED
#endif

static inline int64_t load_acquire(const int64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline void store_release(int64_t *word, int64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline double monotonic(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Operators as they are numbered here; those of the record are the library's own. */
enum { SUM, PROD, MIN, MAX, BAND, BOR, BXOR, LOR, LAND, LXOR, OPERATORS };
/* Elements as they are reduced. */
enum { I8, U8, I16, U16, I32, U32, I64, U64, F32, F64, ELEMENTS };

/* A loop returns whether a result is NaN: where two NaNs meet, which one it is depends on the
   instruction, and NumPy's are others. */
#define LOOP(name, T, expression)                                                                  \
    CLONED static int name(void *out, const void *first, const void *second, size_t n) {            \
        T *o = out;                                                                                 \
        const T *a = first, *b = second;                                                            \
        for (size_t i = 0; i < n; i++) o[i] = (T)(expression);                                      \
        return 0;                                                                                   \
    }

#define FLOATS(name, T, U, expression)                                                             \
    CLONED static int name(void *out, const void *first, const void *second, size_t n) {            \
        T *o = out;                                                                                 \
        const T *a = first, *b = second;                                                            \
        U nan = 0;                                                                                  \
        for (size_t i = 0; i < n; i++) {                                                            \
            T value = expression;                                                                   \
            nan |= value != value;                                                                  \
            o[i] = value;                                                                           \
        }                                                                                           \
        return nan != 0;                                                                            \
    }

#define INTEGERS(t, T, U)                                                                          \
    LOOP(sum_##t, T, (U)a[i] + (U)b[i])                                                             \
    LOOP(prod_##t, T, (U)((uint64_t)(U)a[i] * (uint64_t)(U)b[i]))                                   \
    LOOP(min_##t, T, a[i] < b[i] ? a[i] : b[i])                                                     \
    LOOP(max_##t, T, a[i] > b[i] ? a[i] : b[i])                                                     \
    LOOP(band_##t, T, a[i] & b[i])                                                                  \
    LOOP(bor_##t, T, a[i] | b[i])                                                                   \
    LOOP(bxor_##t, T, a[i] ^ b[i])

INTEGERS(i8, int8_t, uint8_t)
INTEGERS(u8, uint8_t, uint8_t)
INTEGERS(i16, int16_t, uint16_t)
INTEGERS(u16, uint16_t, uint16_t)
INTEGERS(i32, int32_t, uint32_t)
INTEGERS(u32, uint32_t, uint32_t)
INTEGERS(i64, int64_t, uint64_t)
INTEGERS(u64, uint64_t, uint64_t)
FLOATS(sum_f32, float, uint32_t, a[i] + b[i])
FLOATS(prod_f32, float, uint32_t, a[i] * b[i])
FLOATS(sum_f64, double, uint64_t, a[i] + b[i])
FLOATS(prod_f64, double, uint64_t, a[i] * b[i])
LOOP(lor_u8, uint8_t, (a[i] != 0) | (b[i] != 0))
LOOP(land_u8, uint8_t, (a[i] != 0) & (b[i] != 0))
LOOP(lxor_u8, uint8_t, (a[i] != 0) ^ (b[i] != 0))

typedef int (*kernel)(void *, const void *, const void *, size_t);

#define ROW(t) {sum_##t, prod_##t, min_##t, max_##t, band_##t, bor_##t, bxor_##t, 0, 0, 0}
static const kernel KERNELS[ELEMENTS][OPERATORS] = {
    ROW(i8),
    {sum_u8, prod_u8, min_u8, max_u8, band_u8, bor_u8, bxor_u8, lor_u8, land_u8, lxor_u8},
    ROW(i16), ROW(u16), ROW(i32), ROW(u32), ROW(i64), ROW(u64),
    {sum_f32, prod_f32}, {sum_f64, prod_f64},
};

static const size_t WIDTHS[ELEMENTS] = {1, 1, 2, 2, 4, 4, 8, 8, 4, 8};

/* What the operators are, in the order of ReduceOp's codes, of integers, bools and floats; -1: none. */
static const int OPERATORS_OF[3][8] = {
    {SUM, -1, PROD, MIN, MAX, BAND, BOR, BXOR},
    {LOR, -1, LAND, LAND, LOR, LAND, LOR, LXOR},
    {SUM, SUM, PROD, MIN, MAX, -1, -1, -1},
};

static inline kernel kernel_of(int element, int operator_) { return KERNELS[element][operator_]; }

/* Reduce the arrays that lie `stride` bytes apart, in their order; return whether a result is NaN. */
static inline int fold(kernel k, char *out, const char *first, size_t stride, int arrays, size_t n, size_t width) {
    int nan;
    if (arrays == 1) {
        memcpy(out, first, n * width);
        return 0;
    }
    nan = k(out, first, first + stride, n);
    for (int r = 2; r < arrays; r++) nan = k(out, out, first + (size_t)r * stride, n);
    return nan;
}

/* MIN and MAX of floats: integers in the floats' order, in which NaN is what always wins. */
#define KEYS(t, I, T, INFINITY_, NAN_, LOWEST, HIGHEST)                                            \
    CLONED static void encode_##t(void *out, const void *in, size_t n, int highest) {               \
        I *keys = out;                                                                              \
        const I *bits = in;                                                                         \
        const I winner = highest ? HIGHEST : LOWEST;                                                \
        for (size_t i = 0; i < n; i++) {                                                            \
            I key = bits[i] ^ ((bits[i] >> (sizeof(I) * 8 - 1)) & HIGHEST);                         \
            keys[i] = (bits[i] & HIGHEST) > INFINITY_ ? winner : key;                               \
        }                                                                                           \
    }                                                                                               \
    CLONED static void decode_##t(void *out, const void *in, size_t n, int highest) {               \
        I *bits = out;                                                                              \
        const I *keys = in;                                                                         \
        const I winner = highest ? HIGHEST : LOWEST;                                                \
        for (size_t i = 0; i < n; i++) {                                                            \
            I key = keys[i];                                                                        \
            bits[i] = key == winner ? NAN_ : key ^ ((key >> (sizeof(I) * 8 - 1)) & HIGHEST);        \
        }                                                                                           \
    }                                                                                               \
    CLONED static void divide_##t(void *out, size_t n, int divisor) {                               \
        T *values = out;                                                                            \
        for (size_t i = 0; i < n; i++) values[i] = values[i] / (T)divisor;                          \
    }

KEYS(f32, int32_t, float, 0x7F800000, 0x7FC00000, INT32_MIN, INT32_MAX)
KEYS(f64, int64_t, double, 0x7FF0000000000000, 0x7FF8000000000000, INT64_MIN, INT64_MAX)

#endif
