// Push-pull convolution on a CPU: all that follows the convolution of the push kernel, in one pass over its response.
//
// The names are those of pushpull_fast.py: with P~ the response of the push kernel less m, S the sum of the input under
// the kernel, avg the average over the window,
//
//     P = P~ + m S,    Q = (c - m) avg(S) - avg(P~),    R = relu(P) - alpha relu(Q)
//
// Maps are dense, in channels_last or contiguous. All is computed in float32; what is not a number stays so. REACH, to be
// defined by the compiler's options, is how many values the window reaches to each side.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

struct Bfloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(Bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void store(float& place, float value) { place = value; }

inline void store(Bfloat16& place, float value) {  // rounded to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place.bits = value != value ? 0x7fc0 : rounded;
}

constexpr int SIDE = 2 * REACH + 1;  // of the window

inline float relu(float value) { return value < 0 ? 0 : value; }

inline float higher(float one, float other) { return one > other || one != one ? one : other; }

struct Input {
    int64_t images, channels, height, width;
};

struct Kernel {
    int64_t row_stride, column_stride, row_padding, column_padding, row_dilation, column_dilation, height, width;
};

struct Numbers {
    int64_t images, channels, height, width;
    const float *sums, *averages;  // S and avg(S): of each image, row and column
    const float* shares;           // one over the number of values in the window: of each row and column
    const float *mean, *c_less_mean, *alpha;  // of each channel
};

constexpr int64_t LANES = 16;  // channels that are computed together
using Lanes = std::integral_constant<int64_t, LANES>;

// Values that lie side by side: some channels of a pixel in channels_last, else a row of one channel.
template <bool LAST>
struct Run {
    int64_t start;  // in the map
    const float *sums, *averages, *shares, *mean, *c_less_mean, *alpha;

    Run(const Numbers& n, int64_t image, int64_t channel, int64_t row, int64_t column) {
        int64_t pixel = row * n.width + column, of_image = image * n.height * n.width;
        start = LAST ? (of_image + pixel) * n.channels + channel
                     : ((image * n.channels + channel) * n.height + row) * n.width;
        sums = n.sums + of_image + pixel;
        averages = n.averages + of_image + pixel;
        shares = n.shares + pixel;
        mean = n.mean + channel;
        c_less_mean = n.c_less_mean + channel;
        alpha = n.alpha + channel;
    }
    static int64_t by_channel(int64_t i) { return LAST ? i : 0; }
    static int64_t by_pixel(int64_t i) { return LAST ? 0 : i; }
    float strength(int64_t i) const { return alpha[by_channel(i)]; }
    float average(int64_t i) const { return averages[by_pixel(i)]; }
    float share(int64_t i) const { return shares[by_pixel(i)]; }
    float push(int64_t i, float response) const { return response + mean[by_channel(i)] * sums[by_pixel(i)]; }
    float pull(int64_t i, float box) const { return c_less_mean[by_channel(i)] * average(i) - box * share(i); }
};

// Memory of one thread.
template <bool LAST>
struct Scratch {
    int64_t values;  // of a row
    std::vector<float> columns, box, rows;
    std::vector<char> nothing;  // a row outside the map

    Scratch(const Numbers& n, int64_t kept_rows)
        : values(LAST ? n.width * n.channels : n.width),
          columns(LAST ? 0 : n.width + 2 * REACH),
          box(LAST ? n.channels : n.width),
          rows(kept_rows * values),
          nothing(values * sizeof(float)) {}
};

// Sum the window around each value of a row of some channels, given the rows that it covers: the sums of each pixel are
// handed on, and what is known of the number of channels.
template <class T, class Count, class Use>
inline void box_sums_of_channels(const T* const* covered, const Numbers& n, int64_t channel, Count count, Use use) {
    float columns[SIDE][LANES] = {}, box[LANES];
    for (int64_t column = -REACH; column < n.width; ++column) {
        for (int k = 0; k + 1 < SIDE; ++k)
            for (int64_t i = 0; i < count; ++i) columns[k][i] = columns[k + 1][i];
        if (column + REACH < n.width) {
            const int64_t place = (column + REACH) * n.channels + channel;
            float sums[LANES] = {};
            for (int k = 0; k < SIDE; ++k)
                for (int64_t i = 0; i < count; ++i) sums[i] += load(covered[k][place + i]);
            for (int64_t i = 0; i < count; ++i) columns[SIDE - 1][i] = sums[i];
        } else {
            for (int64_t i = 0; i < count; ++i) columns[SIDE - 1][i] = 0;
        }
        if (column < 0) continue;
        for (int64_t i = 0; i < count; ++i) {
            float sum = 0;
            for (int k = 0; k < SIDE; ++k) sum += columns[k][i];
            box[i] = sum;
        }
        use(column, channel, box, count);
    }
}

// The same for all values of a row, run by run.
template <bool LAST, class T, class Use>
inline void box_sums(const T* const* covered, const Numbers& n, Scratch<LAST>& scratch, Use use) {
    if constexpr (LAST) {
        int64_t channel = 0;
        for (; channel + LANES <= n.channels; channel += LANES)
            box_sums_of_channels(covered, n, channel, Lanes(), use);
        if (channel < n.channels) box_sums_of_channels(covered, n, channel, n.channels - channel, use);
    } else {
        float* __restrict__ columns = scratch.columns.data();  // zeros at both ends
        float* __restrict__ box = scratch.box.data();
        for (int64_t i = 0; i < n.width; ++i) {
            float sum = 0;
            for (int k = 0; k < SIDE; ++k) sum += load(covered[k][i]);
            columns[i + REACH] = sum;
        }
        for (int64_t i = 0; i < n.width; ++i) {
            float sum = 0;
            for (int k = 0; k < SIDE; ++k) sum += columns[i + k];
            box[i] = sum;
        }
        use(0, 0, box, n.width);
    }
}

// The rows of a map that the window around one of its rows covers.
template <class T>
inline void cover(const T* map, int64_t row, int64_t height, int64_t values, const void* nothing, const T** covered) {
    for (int k = -REACH; k <= REACH; ++k) {
        bool inside = row + k >= 0 && row + k < height;
        covered[k + REACH] = inside ? map + (row + k) * values : static_cast<const T*>(nothing);
    }
}

template <bool LAST, class T, class R>
void respond(const Numbers& n, const T* push, R* output, int threads) {
    const int64_t planes = LAST ? 1 : n.channels, tasks = n.images * planes * n.height;
#pragma omp parallel num_threads(threads)
    {
        Scratch<LAST> scratch(n, 0);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t row = task % n.height, plane = task / n.height;
            const T* covered[SIDE];
            const T* map = push + plane * n.height * scratch.values;
            cover(map, row, n.height, scratch.values, scratch.nothing.data(), covered);
            box_sums<LAST>(covered, n, scratch, [&](int64_t column, int64_t channel, const float* box, auto count) {
                const Run<LAST> run(n, plane / planes, plane % planes + channel, row, column);
                const T* from = push + run.start;
                R* to = output + run.start;
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) {
                    float p = run.push(i, load(from[i])), q = run.pull(i, box[i]);
                    store(to[i], relu(p) - run.strength(i) * relu(q));
                }
            });
        }
    }
}

// S: of each place of the kernel the sum of the channels under it.
template <bool LAST, class T>
void sum_under_kernel(const Input& input, const T* images, const Kernel& kernel, int64_t height, int64_t width,
                      float* sums, int threads) {
    const int64_t planes = LAST ? 1 : input.channels, values = LAST ? input.width * input.channels : input.width;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> of_rows(values), padded(input.width + 2 * kernel.column_padding);
        float* columns = padded.data() + kernel.column_padding;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < input.images * height; ++task) {
            const int64_t image = task / height, y = task % height;
            float* under = LAST ? of_rows.data() : columns;
            std::memset(under, 0, values * sizeof(float));
            for (int64_t plane = image * planes; plane < (image + 1) * planes; ++plane) {
                for (int64_t k = 0; k < kernel.height; ++k) {
                    const int64_t row = y * kernel.row_stride - kernel.row_padding + k * kernel.row_dilation;
                    if (row < 0 || row >= input.height) continue;
                    const T* from = images + (plane * input.height + row) * values;
#pragma omp simd
                    for (int64_t i = 0; i < values; ++i) under[i] += load(from[i]);
                }
            }
            if (LAST) {
                for (int64_t x = 0; x < input.width; ++x) {
                    float sum = 0;
                    for (int64_t i = 0; i < input.channels; ++i) sum += under[x * input.channels + i];
                    columns[x] = sum;
                }
            }
            float* of_row = sums + task * width;
            std::memset(of_row, 0, width * sizeof(float));
            for (int64_t k = 0; k < kernel.width; ++k) {
                const float* from = padded.data() + k * kernel.column_dilation;
#pragma omp simd
                for (int64_t x = 0; x < width; ++x) of_row[x] += from[x * kernel.column_stride];
            }
        }
    }
}

struct Pool {
    int64_t kernel, stride, padding, height, width;  // the last two of its result
};

// BatchNorm as scale and shift, max-pool and ReLU of the response; both maps in channels_last.
template <class T, class R>
void respond_pooled(const Numbers& n, const T* push, const float* scale, const float* shift, const Pool& pool,
                    R* output, int threads) {
    constexpr int64_t BLOCK = 8;  // pooled rows, whose rows of the response are computed once
    const int64_t blocks = (pool.height + BLOCK - 1) / BLOCK, values = n.width * n.channels;
#pragma omp parallel num_threads(threads)
    {
        Scratch<true> scratch(n, pool.kernel);
        std::vector<float> best(values);
        float* __restrict__ highest = best.data();
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n.images * blocks; ++task) {
            const int64_t image = task / blocks, first = task % blocks * BLOCK;
            const T* map = push + image * n.height * values;
            int64_t computed = 0;  // rows before this one are
            for (int64_t y = first; y < first + BLOCK && y < pool.height; ++y) {
                int64_t top = y * pool.stride - pool.padding, bottom = top + pool.kernel;
                top = top < 0 ? 0 : top;
                bottom = bottom > n.height ? n.height : bottom;
                for (int64_t row = computed > top ? computed : top; row < bottom; ++row) {
                    const T* covered[SIDE];
                    cover(map, row, n.height, values, scratch.nothing.data(), covered);
                    float* response = scratch.rows.data() + row % pool.kernel * values;
                    box_sums<true>(covered, n, scratch, [&](int64_t column, int64_t channel, const float* box, auto count) {
                        const Run<true> run(n, image, channel, row, column);
                        const T* from = push + run.start;
                        float* to = response + column * n.channels + channel;
#pragma omp simd
                        for (int64_t i = 0; i < count; ++i) {
                            float p = run.push(i, load(from[i])), q = run.pull(i, box[i]);
                            float r = relu(p) - run.strength(i) * relu(q);
                            to[i] = r * scale[channel + i] + shift[channel + i];
                        }
                    });
                }
                computed = bottom;
                for (int64_t row = top; row < bottom; ++row) {
                    const float* __restrict__ from = scratch.rows.data() + row % pool.kernel * values;
                    if (row == top) {
                        std::memcpy(highest, from, values * sizeof(float));
                    } else {
                        for (int64_t i = 0; i < values; ++i) highest[i] = higher(from[i], highest[i]);
                    }
                }
                for (int64_t x = 0; x < pool.width; ++x) {
                    int64_t left = x * pool.stride - pool.padding, right = left + pool.kernel;
                    left = left < 0 ? 0 : left;
                    right = right > n.width ? n.width : right;
                    float* __restrict__ of_window = scratch.box.data();
                    std::memset(of_window, 0, n.channels * sizeof(float));  // as ReLU does
                    for (int64_t column = left; column < right; ++column) {
                        const float* __restrict__ from = highest + column * n.channels;
                        for (int64_t i = 0; i < n.channels; ++i) of_window[i] = higher(from[i], of_window[i]);
                    }
                    R* __restrict__ to = output + ((image * pool.height + y) * pool.width + x) * n.channels;
                    for (int64_t i = 0; i < n.channels; ++i) store(to[i], of_window[i]);
                }
            }
        }
    }
}

// The gradient of P~, and for each channel the sums of -dR/dalpha and of -dR/dc over alpha, weighted by the gradient.
template <bool LAST, class T, class R>
void differentiate(const Numbers& n, const T* push, const R* gradient, T* of_push, double* of_alpha, double* of_c,
                   int threads) {
    constexpr int64_t BLOCK = 16;
    const int64_t planes = LAST ? 1 : n.channels, rows = LAST ? BLOCK : n.height;
    const int64_t blocks = (n.height + rows - 1) / rows, tasks = n.images * planes * blocks;
    const int64_t counted = LAST ? n.channels : 1;
    std::vector<double> partial(tasks * counted * 2);  // added in the end, always in the same order
#pragma omp parallel num_threads(threads)
    {
        Scratch<LAST> scratch(n, SIDE);
        std::vector<float> sums(2 * counted);
        const int64_t values = scratch.values;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t plane = task / blocks, first = task % blocks * rows;
            const int64_t last = first + rows < n.height ? first + rows : n.height;
            const T* map = push + plane * n.height * values;
            double* of_task = partial.data() + task * counted * 2;
            for (int64_t row = first - REACH; row < last + REACH; ++row) {
                // Of this row, what the gradient of Q gives to each value in the window: as it is, over -alpha.
                float* shared = scratch.rows.data() + (row + SIDE) % SIDE * values;
                if (row < 0 || row >= n.height) {
                    std::memset(shared, 0, values * sizeof(float));
                } else {
                    const T* covered[SIDE];
                    cover(map, row, n.height, values, scratch.nothing.data(), covered);
                    const bool counts = row >= first && row < last;
                    std::memset(sums.data(), 0, sums.size() * sizeof(float));
                    box_sums<LAST>(covered, n, scratch, [&](int64_t column, int64_t channel, const float* box, auto count) {
                        const Run<LAST> run(n, plane / planes, plane % planes + channel, row, column);
                        const R* from = gradient + run.start;
                        float* to = shared + (LAST ? column * n.channels + channel : 0);
                        float *by_alpha = sums.data() + channel, *by_c = by_alpha + counted;
                        float alphas = 0, cs = 0;
#pragma omp simd reduction(+ : alphas, cs)
                        for (int64_t i = 0; i < count; ++i) {
                            float q = run.pull(i, box[i]), passed = q <= 0 ? 0 : load(from[i]);
                            to[i] = passed * run.share(i);
                            if (LAST) {
                                by_alpha[i] += passed * q;
                                by_c[i] += passed * run.average(i);
                            } else {
                                alphas += passed * q;
                                cs += passed * run.average(i);
                            }
                        }
                        if (!LAST) by_alpha[0] += alphas, by_c[0] += cs;
                    });
                    if (counts)
                        for (int64_t i = 0; i < 2 * counted; ++i) of_task[i] += sums[i];
                }
                const int64_t done = row - REACH;  // the row whose window is complete now
                if (done < first) continue;
                const float* covered[SIDE];
                for (int64_t k = 0; k < SIDE; ++k)
                    covered[k] = scratch.rows.data() + (done - REACH + k + SIDE) % SIDE * values;
                box_sums<LAST>(covered, n, scratch, [&](int64_t column, int64_t channel, const float* box, auto count) {
                    const Run<LAST> run(n, plane / planes, plane % planes + channel, done, column);
                    const R* of_output = gradient + run.start;
                    const T* from = push + run.start;
                    T* to = of_push + run.start;
#pragma omp simd
                    for (int64_t i = 0; i < count; ++i) {
                        float passed = run.push(i, load(from[i])) <= 0 ? 0 : load(of_output[i]);
                        store(to[i], passed + run.strength(i) * box[i]);
                    }
                });
            }
        }
    }
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t channel = LAST ? 0 : task / blocks % planes;
        for (int64_t i = 0; i < counted; ++i) {
            of_alpha[channel + i] += partial[task * counted * 2 + i];
            of_c[channel + i] += partial[task * counted * 2 + counted + i];
        }
    }
}

// Call `work` with the memory format and the data types as constants.
template <class Work>
void choose(bool channels_last, bool half_push, bool half_result, Work work) {
    auto by_type = [&](auto last) {
        if (half_push)
            work(last, Bfloat16{}, Bfloat16{});
        else if (half_result)
            work(last, float{}, Bfloat16{});
        else
            work(last, float{}, float{});
    };
    if (channels_last)
        by_type(std::true_type{});
    else
        by_type(std::false_type{});
}

}  // namespace

extern "C" {

void push_pull_sums(const Input* input, int64_t channels_last, int64_t half, const void* images, const Kernel* kernel,
                    int64_t height, int64_t width, float* sums, int64_t threads) {
    choose(channels_last, half, half, [&](auto last, auto from, auto) {
        using T = decltype(from);
        sum_under_kernel<last()>(*input, static_cast<const T*>(images), *kernel, height, width, sums, threads);
    });
}

void push_pull(const Numbers* numbers, int64_t channels_last, int64_t half_push, int64_t half_result, const void* push,
               void* output, int64_t threads) {
    choose(channels_last, half_push, half_result, [&](auto last, auto from, auto to) {
        using T = decltype(from);
        using R = decltype(to);
        respond<last()>(*numbers, static_cast<const T*>(push), static_cast<R*>(output), threads);
    });
}

void push_pull_pooled(const Numbers* numbers, int64_t half_push, int64_t half_result, const void* push,
                      const float* scale, const float* shift, const Pool* pool, void* output, int64_t threads) {
    choose(true, half_push, half_result, [&](auto, auto from, auto to) {
        using T = decltype(from);
        using R = decltype(to);
        respond_pooled(*numbers, static_cast<const T*>(push), scale, shift, *pool, static_cast<R*>(output), threads);
    });
}

void push_pull_backward(const Numbers* numbers, int64_t channels_last, int64_t half_push, int64_t half_result,
                        const void* push, const void* gradient, void* of_push, double* of_alpha, double* of_c,
                        int64_t threads) {
    choose(channels_last, half_push, half_result, [&](auto last, auto from, auto to) {
        using T = decltype(from);
        using R = decltype(to);
        differentiate<last()>(*numbers, static_cast<const T*>(push), static_cast<const R*>(gradient),
                              static_cast<T*>(of_push), of_alpha, of_c, threads);
    });
}
}
