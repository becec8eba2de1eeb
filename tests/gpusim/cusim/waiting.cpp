// Where threads wait for each other: the block's barrier, and lanes of a warp that exchange something.
#include <string.h>

#include <list>

#include "block.h"

namespace cusim {
namespace {

struct Barrier {
  int arrived = 0, holding = 0;  // of the current generation
  unsigned generation = 0;
  Site site;
  int result[2];
  char order[2];  // addresses for release and acquire
} at_barrier;

struct Meeting {
  unsigned mask, arrived = 0, left = 0;
  Site site;
  char data[kWarp * kMeetBytes];  // what each lane came with

  Meeting(unsigned mask, const Site& site) : mask(mask), site(site) {}
};
std::vector<std::list<Meeting>> meetings;  // of each warp: those that not all lanes have left

bool same(const Site& a, const Site& b) { return a.line == b.line && !strcmp(a.file, b.file); }

void check_together(const Meeting& meeting, unsigned mask, const Site& site) {
  const auto sites = [&] { return text(meeting.site) + " and " + text(site); };
  if (meeting.mask != mask) fail("lanes of a warp disagree on the mask: " + sites());
  const bool alike = !strcmp(meeting.site.what, site.what), anywhere = !strcmp(site.what, "__syncwarp");
  if (!alike || (!anywhere && !same(meeting.site, site))) fail("lanes of a warp meet at " + sites());
}

// The meeting that the lane takes part in: the one that waits for it, or a new one.
std::list<Meeting>::iterator join(int lane, unsigned mask, const Site& site) {
  auto& of_warp = meetings[self->warp];
  if (!(mask >> lane & 1)) fail(text(site) + ": the lane is not in its own mask");
  for (auto m = of_warp.begin(); m != of_warp.end(); ++m) {
    if (m->arrived == m->mask || !(m->mask & mask)) continue;
    check_together(*m, mask, site);
    return m;
  }
  return of_warp.emplace(of_warp.end(), mask, site);
}

void wake_lanes(unsigned mask) {
  const int first = self->warp * kWarp;
  for (int i = first; i < first + kWarp && i < thread_count; i++) {
    if (mask >> threads[i].lane & 1) threads[i].waits = false;
  }
}

}  // namespace

void reset_barrier() { at_barrier = Barrier(); }

void finish_barrier() {
  Barrier& b = at_barrier;
  if (b.arrived == 0 || b.arrived < alive) return;
  b.result[b.generation++ & 1] = b.holding;
  b.arrived = b.holding = 0;
  for (int i = 0; i < thread_count; i++) threads[i].waits = false;
}

int barrier(bool predicate, const Site& site) {
  Barrier& b = at_barrier;
  if (b.arrived == 0) b.site = site;
  if (!same(b.site, site)) fail("divergent barrier: " + text(b.site) + " and " + text(site));
  const unsigned turn = b.generation & 1;
  const unsigned generation = b.generation;
  b.arrived++, b.holding += predicate;
  release(&b.order[turn]);
  finish_barrier();
  if (b.generation == generation) wait_at(site);
  acquire(&b.order[turn]);
  return b.result[turn];
}

void reset_meetings() { meetings.assign((thread_count + kWarp - 1) / kWarp, {}); }

void meet(unsigned mask, const void* mine, size_t bytes, void* all, const Site& site) {
  const int lane = self->lane;
  auto& of_warp = meetings[self->warp];
  auto meeting = join(lane, mask, site);
  copy_unwatched(meeting->data + lane * bytes, mine, bytes);
  meeting->arrived |= 1u << lane;
  release(&*meeting);
  if (meeting->arrived == mask) wake_lanes(mask);
  else wait_at(site);
  acquire(&*meeting);
  copy_unwatched(all, meeting->data, kWarp * bytes);
  if ((meeting->left |= 1u << lane) == mask) of_warp.erase(meeting);
}

}  // namespace cusim
