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
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

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

/* Copy past the caches: of what is larger than they are nothing would be left in them, and lines that
   are written whole need not be fetched first. */
static inline void stream(char *into, const char *source, size_t n) {
#if defined(__x86_64__)
    size_t head = -(uintptr_t)into & 63;
    if (head > n) head = n;
    memcpy(into, source, head);
    for (into += head, source += head, n -= head; n >= 64; into += 64, source += 64, n -= 64) {
        const __m128i *from = (const __m128i *)source;
        __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
        __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
        _mm_stream_si128((__m128i *)into, a);
        _mm_stream_si128((__m128i *)into + 1, b);
        _mm_stream_si128((__m128i *)into + 2, c);
        _mm_stream_si128((__m128i *)into + 3, d);
    }
    _mm_sfence(); /* before any flag that says so */
#endif
    memcpy(into, source, n);
}

static inline double monotonic(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Operators as they are numbered here; those of the record are the library's own. */
enum { SUM, PROD, MIN, MAX, BAND, BOR, BXOR, LOR, LAND, LXOR, OPERATORS };
/* Elements as they are reduced, and the halves, which are widened for that. */
enum { I8, U8, I16, U16, I32, U32, I64, U64, F32, F64, ELEMENTS, F16 = ELEMENTS, BF16 };

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

static const size_t WIDTHS[] = {1, 1, 2, 2, 4, 4, 8, 8, 4, 8, 2, 2};

/* MIN and MAX of floats: integers in the floats' order, in which NaN is what always wins. */
#define KEYS(t, I, INFINITY_, NAN_, LOWEST, HIGHEST)                                               \
    CLONED static void encode_##t(void *out, const void *in, size_t n, int highest) {               \
        I *keys = out;                                                                              \
        const I *bits = in;                                                                         \
        const I winner = highest ? HIGHEST : LOWEST;                                                \
        for (size_t i = 0; i < n; i++) {                                                            \
            I key = bits[i] ^ ((I)(bits[i] >> (sizeof(I) * 8 - 1)) & HIGHEST);                      \
            keys[i] = (bits[i] & HIGHEST) > INFINITY_ ? winner : key;                               \
        }                                                                                           \
    }                                                                                               \
    CLONED static void decode_##t(void *out, const void *in, size_t n, int highest) {               \
        I *bits = out;                                                                              \
        const I *keys = in;                                                                         \
        const I winner = highest ? HIGHEST : LOWEST;                                                \
        for (size_t i = 0; i < n; i++) {                                                            \
            I key = keys[i];                                                                        \
            bits[i] = key == winner ? NAN_ : key ^ ((I)(key >> (sizeof(I) * 8 - 1)) & HIGHEST);     \
        }                                                                                           \
    }

KEYS(f32, int32_t, 0x7F800000, 0x7FC00000, INT32_MIN, INT32_MAX)
KEYS(f64, int64_t, 0x7FF0000000000000, 0x7FF8000000000000, INT64_MIN, INT64_MAX)
KEYS(f16, int16_t, 0x7C00, 0x7E00, INT16_MIN, INT16_MAX)
KEYS(bf16, int16_t, 0x7F80, 0x7FC0, INT16_MIN, INT16_MAX)

CLONED static void divide_f32(void *out, size_t n, int divisor) {
    float *values = out;
    for (size_t i = 0; i < n; i++) values[i] = values[i] / (float)divisor;
}

CLONED static void divide_f64(void *out, size_t n, int divisor) {
    double *values = out;
    for (size_t i = 0; i < n; i++) values[i] = values[i] / (double)divisor;
}

/* Halves become floats exactly, and floats halves rounded to the nearest, ties to even.  Without
   denormal operands, which a process may have had flushed.  NaN is not rounded here: a result that
   is NaN is left to the general way. */
static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

CLONED static void widen_f16(float *out, const uint16_t *in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t sign = (uint32_t)(in[i] & 0x8000) << 16, magnitude = (uint32_t)(in[i] & 0x7FFF) << 13;
        uint32_t normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
        uint32_t small = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
        uint32_t bits = magnitude >= (31u << 23) ? special : magnitude < (1u << 23) ? small : normal;
        out[i] = float_of(bits | sign);
    }
}

CLONED static void narrow_f16(uint16_t *out, const float *in, size_t n) {
    const float magic = float_of(126u << 23); /* adding it leaves what a denormal half holds */
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = bits_of(in[i]), sign = bits & 0x80000000u, magnitude = bits ^ sign;
        uint32_t small = bits_of(float_of(magnitude) + magic) - (126u << 23);
        uint32_t normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
        uint32_t half = magnitude >= (143u << 23) ? 0x7C00 : magnitude < (113u << 23) ? small : normal;
        out[i] = (uint16_t)(half | sign >> 16);
    }
}

CLONED static void widen_bf16(float *out, const uint16_t *in, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = float_of((uint32_t)in[i] << 16);
}

CLONED static void narrow_bf16(uint16_t *out, const float *in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = bits_of(in[i]);
        out[i] = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
}

static inline void widen(int element, float *out, const void *in, size_t n) {
    if (element == F16) widen_f16(out, in, n);
    else widen_bf16(out, in, n);
}

static inline void narrow(int element, void *out, const float *in, size_t n) {
    if (element == F16) narrow_f16(out, in, n);
    else narrow_bf16(out, in, n);
}

/* How one dtype is reduced under one operator: `arrays/dtypes.py` in C. */
typedef struct {
    kernel reduce; /* 0: not here */
    int element;   /* of the user's array */
    int ordered, highest, widened, divided;
    size_t width, wire; /* bytes of an element, as it is and as it is reduced */
} plan;

/* By our codes, which never change. */
enum { DTYPES = 18, OPS = 8 };
static const int ELEMENT_OF[DTYPES] = {-1, U8, I8, U8, I16, U16, I32, U32, I64, U64, F16, F32, F64, -1, -1, -1, -1, BF16};
enum { BOOL_CODE = 1, AVG_OP = 1 };
static const int OPERATORS_OF[3][OPS] = { /* of integers, bools and floats, by ReduceOp's codes; -1: none */
    {SUM, -1, PROD, MIN, MAX, BAND, BOR, BXOR},
    {LOR, -1, LAND, LAND, LOR, LAND, LOR, LXOR},
    {SUM, SUM, PROD, MIN, MAX, -1, -1, -1},
};
static plan PLANS[DTYPES][OPS];

static void lay_plans(void) {
    for (int code = 0; code < DTYPES; code++) {
        for (int op = 0; op < OPS; op++) {
            plan *p = &PLANS[code][op];
            int element = ELEMENT_OF[code], floats = element >= F32;
            int operator_ = element < 0 ? -1 : OPERATORS_OF[floats ? 2 : code == BOOL_CODE][op];
            if (operator_ < 0) continue;
            p->element = element;
            p->width = p->wire = WIDTHS[element];
            p->divided = op == AVG_OP;
            p->ordered = floats && (operator_ == MIN || operator_ == MAX);
            p->highest = operator_ == MAX;
            p->widened = !p->ordered && element >= F16;
            if (p->ordered) element = p->width == 2 ? I16 : p->width == 4 ? I32 : I64;
            if (p->widened) element = F32, p->wire = 4;
            p->reduce = KERNELS[element][operator_];
        }
    }
}

static inline const plan *plan_of(int64_t dtype, int op) {
    if (dtype < 0 || dtype >= DTYPES || op < 0 || op >= OPS || !PLANS[dtype][op].reduce) return 0;
    return &PLANS[dtype][op];
}

/* Write elements as they are reduced. */
static inline void encode(const plan *p, char *out, const void *in, size_t n) {
    if (p->widened) widen(p->element, (float *)out, in, n);
    else if (!p->ordered) memcpy(out, in, n * p->width);
    else if (p->element == F16) encode_f16(out, in, n, p->highest);
    else if (p->element == BF16) encode_bf16(out, in, n, p->highest);
    else if (p->element == F32) encode_f32(out, in, n, p->highest);
    else encode_f64(out, in, n, p->highest);
}

/* Make of reduced elements, which lie as they are reduced, what the user gets. */
static inline void decode(const plan *p, char *out, char *in, size_t n, int ranks) {
    if (p->ordered) {
        if (p->element == F16) decode_f16(out, in, n, p->highest);
        else if (p->element == BF16) decode_bf16(out, in, n, p->highest);
        else if (p->element == F32) decode_f32(out, in, n, p->highest);
        else decode_f64(out, in, n, p->highest);
        return;
    }
    if (p->divided) {
        if (p->wire == 4) divide_f32(in, n, ranks);
        else divide_f64(in, n, ranks);
    }
    if (p->widened) narrow(p->element, out, (float *)in, n);
    else if (out != in) memcpy(out, in, n * p->width);
}

static inline int has_nan(const float *values, size_t n) {
    uint32_t nan = 0;
    for (size_t i = 0; i < n; i++) nan |= values[i] != values[i];
    return nan != 0;
}

enum { PIECE = 2048 }; /* elements that are widened at a time */

/* Reduce arrays that lie `stride` bytes apart, in their order, into the user's; `encoded`: they lie
   as they are reduced.  `own`: the one that the user's array still holds, or -1; of the first two it is
   taken from there, which halves the time where it has just been written.
   Return whether a result is NaN: then what is there is of no use. */
static int fold(const plan *p, char *out, const char *first, size_t stride, int arrays, size_t n, int ranks, int encoded, int own) {
    double total_[PIECE], next_[PIECE];
    char *total = (char *)total_, *next = (char *)next_;
    size_t width = encoded ? p->wire : p->width;
    int nan = 0;
    const char *first_of = first;
    if (p->width == p->wire && (encoded || !p->ordered)) { /* in the user's array itself */
        const char *second = first + stride;
        if (own == 0 && !p->ordered) first_of = out;
        if (own == 1 && !p->ordered) second = out;
        if (arrays > 1) nan = p->reduce(out, first_of, second, n);
        else if (first_of != out) memcpy(out, first_of, n * p->width);
        for (int r = 2; r < arrays; r++) nan = p->reduce(out, out, first + (size_t)r * stride, n);
        if (!nan) decode(p, out, out, n, ranks);
        return nan;
    }
    for (size_t at = 0; at < n; at += PIECE) {
        size_t m = n - at < PIECE ? n - at : PIECE;
        const char *from = first + at * width;
        if (encoded) memcpy(total, from, m * p->wire);
        else encode(p, total, from, m);
        for (int r = 1; r < arrays; r++) {
            const char *with = from + (size_t)r * stride;
            if (!encoded) encode(p, next, with, m), with = next;
            nan |= p->reduce(total, total, with, m);
        }
        if (nan || (arrays == 1 && p->widened && has_nan((float *)total, m))) return 1;
        decode(p, out + at * p->width, total, m, ranks);
    }
    return 0;
}

#endif
