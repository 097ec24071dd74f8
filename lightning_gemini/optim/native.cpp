// The update rules as one pass over a shard in host memory. native.py builds and calls this file; the rules' own files
// say where they come from. One element at a time, in a form that compilers turn into vectors, and with the operations
// of torch's CPU kernels in their order: what is written as fma here is contracted to one there.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace {

using bf16 = std::uint16_t;
using index_t = std::int64_t;

constexpr index_t part_size = 1 << 17;  // what one thread takes at a time: starting it costs a tenth of that work

float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float widen(float value) { return value; }
float widen(bf16 value) { return as_float(std::uint32_t(value) << 16); }

constexpr bf16 nan16 = 0x7fc0;

// To nearest, ties away from zero: what can be undone from the low half alone.
bf16 round_away(float value) { return value != value ? nan16 : bf16((as_bits(value) + 0x8000u) >> 16); }

bf16 round_even(float value) {
    const std::uint32_t bits = as_bits(value);
    return value != value ? nan16 : bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Up with the probability of the part that is cut off; `noise` is uniform in its low half.
bf16 round_randomly(float value, std::uint32_t noise) {
    const std::uint32_t bits = as_bits(value);
    const std::uint32_t add = std::fabs(value) < INFINITY ? noise & 0xffffu : 0;
    return value != value ? nan16 : bf16((bits + add) >> 16);
}

// "lowbias32", a hash of 32 bits: C. Wellons, hash-prospector
std::uint32_t hash(std::uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return std::fma(a, b, c);
#else
    return a * b + c;  // in software it would take a hundred times as long
#endif
}

float lerp(float a, float b, float w) { return std::fabs(w) < 0.5f ? fma(w, b - a, a) : fma(w - 1, b - a, b); }

// Rules: hyper-parameters in the order of the rule's `scalars`, and the update of one element.

template <bool amsgrad>
struct Adam {
    static constexpr int states = 2 + amsgrad;
    float sign, decay, l2, w1, beta2, w2, root, eps, step;
    float operator()(float x, float g, float* s) const {
        x *= decay;
        g = fma(l2, x, sign * g);
        s[0] = lerp(s[0], g, w1);
        s[1] = fma(w2 * g, g, s[1] * beta2);
        if (amsgrad) s[2] = s[2] > s[1] || s[2] != s[2] ? s[2] : s[1];
        return x + (step * s[0]) / (std::sqrt(s[1 + amsgrad]) / root + eps);
    }
};

template <bool momentum>
struct Sgd {
    static constexpr int states = momentum;
    float sign, l2, keep, take, direct, buffered, step;
    float operator()(float x, float g, float* s) const {
        g = fma(l2, x, sign * g);
        if (momentum) {
            s[0] = fma(take, g, s[0] * keep);
            g = fma(buffered, s[0], direct * g);
        }
        return fma(step, g, x);
    }
};

struct Adagrad {
    static constexpr int states = 1;
    float sign, l2, eps, step;
    float operator()(float x, float g, float* s) const {
        g = fma(l2, x, sign * g);
        s[0] = fma(g, g, s[0]);
        return x + (step * g) / (std::sqrt(s[0]) + eps);
    }
};

struct Lion {
    static constexpr int states = 1;
    float sign, decay, w1, w2, step;
    float operator()(float x, float g, float* s) const {
        g *= sign;
        const float c = lerp(s[0], g, w1);
        s[0] = lerp(s[0], g, w2);
        return x * decay + step * (c > 0 ? 1.0f : c < 0 ? -1.0f : c);
    }
};

// Values: where the fp32 value of a parameter is, beside the shard or in it.

struct Plain {
    float* shard;
    Plain(void* shard, void*) : shard(static_cast<float*>(shard)) {}
    float load(index_t i) const { return shard[i]; }
    void store(index_t i, float x) const { shard[i] = x; }
};

struct Low {
    bf16* shard;
    Low(void* shard, void*) : shard(static_cast<bf16*>(shard)) {}
    float load(index_t i) const { return widen(shard[i]); }
    void store(index_t i, float x) const { shard[i] = round_even(x); }
};

struct Master {
    bf16* shard;
    float* master;
    Master(void* shard, void* master) : shard(static_cast<bf16*>(shard)), master(static_cast<float*>(master)) {}
    float load(index_t i) const { return master[i]; }
    void store(index_t i, float x) const {
        master[i] = x;
        shard[i] = round_away(x);
    }
};

struct Split {
    bf16* high;
    std::int16_t* low;
    Split(void* high, void* low) : high(static_cast<bf16*>(high)), low(static_cast<std::int16_t*>(low)) {}
    float load(index_t i) const { return as_float((std::uint32_t(high[i]) << 16) + std::uint32_t(std::int32_t(low[i]))); }
    void store(index_t i, float x) const {
        high[i] = round_away(x);
        low[i] = std::int16_t(as_bits(x));
    }
};

// States: in fp32, or in bf16 with an independent random number for each.

void store_state(float& state, float x, std::uint32_t) { state = x; }
void store_state(bf16& state, float x, std::uint32_t noise) { state = round_randomly(x, noise); }

template <class Rule, class Value, class Grad, class State>
void update(const Rule rule, const Value value, const Grad* grad, State* const* states, index_t begin, index_t end,
            float factor, float limit, std::uint32_t counter) {
    constexpr int n = Rule::states;
    State* const s0 = n > 0 ? states[0] : nullptr;
    State* const s1 = n > 1 ? states[1] : nullptr;
    State* const s2 = n > 2 ? states[2] : nullptr;
    INDEPENDENT
    for (index_t i = begin; i < end; ++i) {
        float g = widen(grad[i]) * factor;
        g = g < -limit ? -limit : g > limit ? limit : g;
        float s[3] = {};
        if (n > 0) s[0] = widen(s0[i]);
        if (n > 1) s[1] = widen(s1[i]);
        if (n > 2) s[2] = widen(s2[i]);
        value.store(i, rule(value.load(i), g, s));
        const std::uint32_t noise = sizeof(State) < sizeof(float) ? hash(std::uint32_t(i) + counter) : 0;
        if (n > 0) store_state(s0[i], s[0], noise);
        if (n > 1) store_state(s1[i], s[1], noise >> 16);
        if (n > 2) store_state(s2[i], s[2], hash(noise));
    }
}

// Calls work(part, begin, end) for all parts of [0, n). Who is slowed down by others takes fewer.
template <class Work>
void share(index_t n, int threads, const Work& work) {
    const index_t parts = (n + part_size - 1) / part_size;
    std::atomic<index_t> next{0};
    const auto take = [&] {
        for (index_t part; (part = next++) < parts;)
            work(part, part * part_size, part + 1 < parts ? (part + 1) * part_size : n);
    };
    std::vector<std::thread> helpers;
    try {
        for (index_t t = 1; t < threads && t < parts; ++t) helpers.emplace_back(take);
    } catch (const std::system_error&) {  // no more threads to be had
    }
    take();
    for (auto& helper : helpers) helper.join();
}

template <class Rule, class Value, class Grad, class State>
void update_all(void* shard, void* master, const void* grad, void* const* states, index_t n, const float* scalars,
                float factor, float limit, std::uint32_t counter, int threads) {
    Rule rule;
    std::memcpy(&rule, scalars, sizeof rule);
    State* s[3] = {};
    for (int k = 0; k < Rule::states; ++k) s[k] = static_cast<State*>(states[k]);
    share(n, threads, [&](index_t, index_t begin, index_t end) {
        update(rule, Value(shard, master), static_cast<const Grad*>(grad), s, begin, end, factor, limit, counter);
    });
}

// The parts' sums are added in their order, whoever made them.
template <class T>
double square_sum(const T* values, index_t n, int threads) {
    constexpr int lanes = 32;
    std::vector<double> sums((n + part_size - 1) / part_size);
    share(n, threads, [&](index_t part, index_t begin, index_t end) {
        double lane[lanes] = {};
        index_t i = begin;
        for (; i + lanes <= end; i += lanes)
            for (int k = 0; k < lanes; ++k) lane[k] += double(widen(values[i + k])) * widen(values[i + k]);
        for (int k = 0; i < end; ++i, ++k) lane[k] += double(widen(values[i])) * widen(values[i]);
        for (double sum : lane) sums[part] += sum;
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
}

}  // namespace

// One rule to a library, so that nobody waits for the others to be compiled; update_<value>_<gradients>_<states>.
#ifdef RULE
#define EXPORT(name, ...)                                                                                         \
    extern "C" void name(void* shard, void* master, const void* grad, void* const* states, index_t n,            \
                         const float* scalars, float factor, float limit, std::uint32_t counter, int threads) {  \
        update_all<RULE, __VA_ARGS__>(shard, master, grad, states, n, scalars, factor, limit, counter, threads); \
    }
#define STATES(name, ...) EXPORT(name##_fp32, __VA_ARGS__, float) EXPORT(name##_bf16, __VA_ARGS__, bf16)
#define GRADS(name, ...) STATES(name##_fp32, __VA_ARGS__, float) STATES(name##_bf16, __VA_ARGS__, bf16)
GRADS(update_plain, Plain)
GRADS(update_low, Low)
GRADS(update_master, Master)
GRADS(update_split, Split)
#endif

extern "C" double square_sum_fp32(const float* values, index_t n, int threads) { return square_sum(values, n, threads); }
extern "C" double square_sum_bf16(const bf16* values, index_t n, int threads) { return square_sum(values, n, threads); }
