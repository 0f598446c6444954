// Statistics of the vocabulary's stretches, merged in their order as they end, whichever thread has made them; so the
// sums are the same for any number of threads, and few stretches wait in memory: about as many as there are threads,
// more only while one stretch takes as long as several others, or merging (one thread at a time) as long as a stretch.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "api.h"

namespace flow_kernels {

// Add one stretch. `is_before`: all of it is in front of the target, so it may hold an equal logit that comes first.
inline void add_stretch(RowTotals& total, const RowStats& part, bool is_before) {
  if (is_before) total.max_before = std::max(total.max_before, part.max);
  const float max = std::max(total.max, part.max);
  // What is -inf only has sum 0 (NaN if a NaN is in it) and takes part with factor 1, not exp(-inf + inf).
  const double total_lower = total.max == -INFINITY ? 0.0 : static_cast<double>(total.max) - max;
  const double part_lower = part.max == -INFINITY ? 0.0 : static_cast<double>(part.max) - max;
  const double total_factor = total_lower == 0 ? 1.0 : std::exp(total_lower);
  const double part_factor = part_lower == 0 ? 1.0 : std::exp(part_lower);
  total.product = (total.product + total.sum * total_lower) * total_factor +
                  (part.product + part.sum * part_lower) * part_factor;
  total.sum = total.sum * total_factor + part.sum * part_factor;
  total.smooth += part.smooth;
  total.max = max;
}

class Stretches {
 public:
  Stretches(const HeadProblem& problem, int64_t count)
      : problem_(problem), totals_(problem.num_rows), ended_(count) {}

  int64_t first_tile(int64_t stretch) const { return stretch * problem_.num_tiles / size(); }
  int64_t size() const { return static_cast<int64_t>(ended_.size()); }

  // Where the statistics [N] of one stretch are to be written.
  using Stats = std::unique_ptr<RowStats[]>;
  Stats room() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return Stats(new RowStats[problem_.num_rows]);
    Stats stats = std::move(free_.back());
    free_.pop_back();
    return stats;
  }

  // A stretch has ended: merge it, and those after it that waited for it, unless another thread is at it and will.
  void add(int64_t stretch, Stats stats) {
    std::unique_lock<std::mutex> lock(mutex_);
    ended_[stretch] = std::move(stats);
    if (is_merging_) return;
    is_merging_ = true;
    for (; next_ < size() && ended_[next_] != nullptr; ++next_) {
      Stats part = std::move(ended_[next_]);
      lock.unlock();
      const int64_t next_class = first_tile(next_ + 1) * problem_.tile;
      for (int64_t i = 0; i < problem_.num_rows; ++i) {
        add_stretch(totals_[i], part[i], next_class <= problem_.rows.target[i]);
      }
      lock.lock();
      free_.push_back(std::move(part));
    }
    is_merging_ = false;
  }

  // Complete once all stretches were added.
  RowTotals total(int64_t row) const {
    RowTotals total = totals_[row];
    total.target_logit = problem_.rows.target_logit[row];
    total.max_before = std::max(total.max_before, problem_.rows.max_before[row]);
    return total;
  }

 private:
  const HeadProblem& problem_;
  std::vector<RowTotals> totals_;
  std::vector<Stats> ended_, free_;  // by stretch; to be used again
  std::mutex mutex_;
  int64_t next_ = 0;  // the stretch to be merged next, by the thread that has set is_merging_
  bool is_merging_ = false;
};

}  // namespace flow_kernels
