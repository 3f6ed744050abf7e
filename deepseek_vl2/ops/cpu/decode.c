/* Products of one row in bfloat16 on a CPU, at the speed at which weights come from memory. See rows.py.

   A vector of weights is read as words of 32 bits, two weights in each: a word's lower half is a weight at an even
   place, its upper half one at an odd place, and either becomes a float by one shift or one mask. The row they are
   multiplied by is split likewise. One row of weights is read after the other: several at a time are slower from
   memory. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* As the registers are: a compiler keeps wider vectors in memory, which takes three times as long. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define PAIRS (2 * LANES) /* weights of a vector */
#define ROWS_AT_A_TIME 32
#define COLUMNS 64 /* of values, summed at a time */
#define BYTES_AHEAD 4096 /* a page: the CPU itself fetches ahead within one, and not into the next */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
/* As they come: at any address. */
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t loose_words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

static inline float widen(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* To the nearest, ties to even, as PyTorch rounds. */
static inline uint16_t narrow(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if (value != value) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

static inline float rounded(float value) { return widen(narrow(value)); }

static inline floats even_of(words pairs) { return (floats)(pairs << 16); }

static inline floats odd_of(words pairs) { return (floats)(pairs & 0xffff0000u); }

static inline float total(floats lanes) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

/* A row as floats: those at even places, then those at odd places. NULL where there is no memory. */
static float *split_row(const uint16_t *x, int64_t width) {
    int64_t half = (width + 1) / 2;
    float *row = malloc(2 * half * sizeof(float));
    if (row)
        for (int64_t i = 0; i < width; i++) row[(i & 1) * half + i / 2] = widen(x[i]);
    return row;
}

static inline float dot(const uint16_t *weight, const float *row, int64_t width) {
    const float *even = row, *odd = row + (width + 1) / 2;
    floats evens = {0}, odds = {0};
    int64_t i = 0;
    for (; i + PAIRS <= width; i += PAIRS) {
        __builtin_prefetch((const char *)(weight + i) + BYTES_AHEAD);
        words pairs = *(const loose_words *)(weight + i);
        evens += even_of(pairs) * *(const loose_floats *)(even + i / 2);
        odds += odd_of(pairs) * *(const loose_floats *)(odd + i / 2);
    }
    float sum = total(evens + odds);
    for (; i < width; i++) sum += widen(weight[i]) * (i & 1 ? odd : even)[i / 2];
    return sum;
}

/* out[rows] = weight[rows, width] x[width] + bias[rows]; bias may be NULL. */
int linear(const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *out, int64_t rows,
           int64_t width, int threads) {
    float *row = split_row(x, width);
    if (!row) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++)
        out[r] = narrow(dot(weight + r * width, row, width) + (bias ? widen(bias[r]) : 0));
    free(row);
    return 0;
}

/* out[rows] = weight[rows, width] x[width], in float32. */
int logits(const uint16_t *x, const uint16_t *weight, float *out, int64_t rows, int64_t width, int threads) {
    float *row = split_row(x, width);
    if (!row) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) out[r] = dot(weight + r * width, row, width);
    free(row);
    return 0;
}

/* x cos + rotate_half(x) sin of one head, in place, each product and the sum rounded. */
static void rotate(uint16_t *x, const uint16_t *cosine, const uint16_t *sine, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = widen(x[i]), second = widen(x[i + half]);
        x[i] = narrow(rounded(first * widen(cosine[i])) + rounded(-second * widen(sine[i])));
        x[i + half] = narrow(rounded(second * widen(cosine[i + half])) + rounded(first * widen(sine[i + half])));
    }
}

/* out[queries + 2 * keys]: queries, keys and values of one row; heads of queries and keys are rotated. */
int queries_keys_values(const uint16_t *x, const uint16_t *query, const uint16_t *key, const uint16_t *value,
                        const uint16_t *cosine, const uint16_t *sine, uint16_t *out, int64_t queries, int64_t keys,
                        int64_t width, int64_t size, int threads) {
    float *row = split_row(x, width);
    if (!row) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < queries + 2 * keys; r++) {
            const uint16_t *weight = r < queries ? query + r * width
                                     : r < queries + keys ? key + (r - queries) * width
                                                          : value + (r - queries - keys) * width;
            out[r] = narrow(dot(weight, row, width));
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < queries + keys; first += size) rotate(out + first, cosine, sine, size);
    }
    free(row);
    return 0;
}

/* out[width]: x over its root mean square, rounded, times the weight, rounded. */
int rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t width, double eps) {
    double squares = 0;
    for (int64_t i = 0; i < width; i++) squares += (double)widen(x[i]) * widen(x[i]);
    float scale = 1 / sqrtf((float)(squares / width) + (float)eps);
    for (int64_t i = 0; i < width; i++) out[i] = narrow(widen(weight[i]) * rounded(widen(x[i]) * scale));
    return 0;
}

/* out[hidden] = sum over count of scales[e] downs[e] (silu(gates[e] x) * ups[e] x), each product rounded and the sum
   in float32; gates and ups are [inner, hidden], downs [hidden, inner]. Without scales there is one, of scale 1. */
int swiglu(const uint16_t *x, const uint16_t *const *gates, const uint16_t *const *ups, const uint16_t *const *downs,
           const float *scales, uint16_t *out, int64_t count, int64_t inner, int64_t hidden, int threads) {
    int64_t half = (inner + 1) / 2, blocks = (inner + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    float *row = split_row(x, hidden), *middle = malloc(count * 2 * half * sizeof(float));
    if (!row || !middle) {
        free(row);
        free(middle);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < count * blocks; b++) {
            int64_t e = b / blocks, first = b % blocks * ROWS_AT_A_TIME;
            int64_t many = inner - first < ROWS_AT_A_TIME ? inner - first : ROWS_AT_A_TIME;
            float gate[ROWS_AT_A_TIME];
            for (int64_t r = 0; r < many; r++) gate[r] = rounded(dot(gates[e] + (first + r) * hidden, row, hidden));
            for (int64_t r = 0; r < many; r++) {
                float up = rounded(dot(ups[e] + (first + r) * hidden, row, hidden));
                float silu = rounded(gate[r] / (1 + expf(-gate[r])));
                int64_t i = first + r;
                middle[(2 * e + (i & 1)) * half + i / 2] = rounded(silu * up);
            }
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < hidden; first += ROWS_AT_A_TIME) {
            int64_t many = hidden - first < ROWS_AT_A_TIME ? hidden - first : ROWS_AT_A_TIME;
            float sums[ROWS_AT_A_TIME] = {0};
            for (int64_t e = 0; e < count; e++)
                for (int64_t r = 0; r < many; r++) {
                    float down = rounded(dot(downs[e] + (first + r) * inner, middle + 2 * e * half, inner));
                    sums[r] += scales ? scales[e] * down : down;
                }
            for (int64_t r = 0; r < many; r++) out[first + r] = narrow(sums[r]);
        }
    }
    free(row);
    free(middle);
    return 0;
}

/* out: the weighted sum of rows that lie step numbers apart, of their first COLUMNS numbers or the few that are left. */
static inline void mix(const uint16_t *rows, const float *weights, uint16_t *out, int64_t length, int64_t step,
                       int64_t left) {
    if (left < COLUMNS) {
        for (int64_t i = 0; i < left; i++) {
            float sum = 0;
            for (int64_t s = 0; s < length; s++) sum += widen(rows[s * step + i]) * weights[s];
            out[i] = narrow(sum);
        }
        return;
    }
    floats evens[COLUMNS / PAIRS] = {0}, odds[COLUMNS / PAIRS] = {0};
    for (int64_t s = 0; s < length; s++)
        for (int part = 0; part < COLUMNS / PAIRS; part++) {
            const uint16_t *numbers = rows + s * step + part * PAIRS;
            __builtin_prefetch((const char *)numbers + BYTES_AHEAD);
            words pairs = *(const loose_words *)numbers;
            evens[part] += even_of(pairs) * weights[s];
            odds[part] += odd_of(pairs) * weights[s];
        }
    for (int64_t i = 0; i < COLUMNS; i++) out[i] = narrow((i & 1 ? odds : evens)[i / PAIRS][i % PAIRS / 2]);
}

/* out[heads, size]: each head's query attends to length keys and values, whose heads lie key_step and value_step numbers
   apart, and whose tokens key_row and value_row; heads / kv_heads queries share a head of keys. Scores and weights are
   rounded, softmax is float32. */
int attend(const uint16_t *query, const uint16_t *key, const uint16_t *value, uint16_t *out, int64_t heads,
           int64_t kv_heads, int64_t length, int64_t size, int64_t key_step, int64_t value_step, int64_t key_row,
           int64_t value_row, double scaling, int threads) {
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
    for (int64_t h = 0; h < heads; h++) {
        int64_t group = h / (heads / kv_heads);
        const uint16_t *keys = key + group * key_step, *values = value + group * value_step;
        float *row = split_row(query + h * size, size), *weights = malloc(length * sizeof(float));
        if (row && weights) {
            float most = -INFINITY, sum = 0;
            for (int64_t s = 0; s < length; s++) {
                weights[s] = rounded(rounded(dot(keys + s * key_row, row, size)) * (float)scaling);
                if (!(weights[s] <= most)) most = weights[s];
            }
            for (int64_t s = 0; s < length; s++) sum += weights[s] = expf(weights[s] - most);
            for (int64_t s = 0; s < length; s++) weights[s] = rounded(weights[s] / sum);
            for (int64_t i = 0; i < size; i += COLUMNS) mix(values + i, weights, out + h * size + i, length, value_row, size - i);
        } else {
            failed = 1;
        }
        free(row);
        free(weights);
    }
    return failed;
}
