package algorithm

import (
	"sync"
	"sync/atomic"
	"time"
)

// tiling has the windows of a period in a zone. They follow one another without a gap: a window begins at the first instant at
// which the zone's clock shows its beginning or a later time. So a midnight that does not exist gives way to the end of the gap,
// of one that comes twice the first counts, and a day that does not exist is no window.
//
// They are computed from the offsets of the zone alone. Time.ZoneBounds does not get beyond the last days of some leap years
// behind the last transition that a zone lists, and which side of a gap time.Date takes is not specified.
type tiling struct {
	period Period
	zone   *time.Location
	memo   atomic.Pointer[window] // that was asked for last
}

// window is from one boundary to the next, in µs.
type window struct{ from, to int64 }

// latest is the last time whose window is computed, in 2223: all boundaries are numbers that Lua holds exactly.
const latest = 8_000_000_000_000_000

// at returns the window that t lies in.
func (w *tiling) at(t int64) (from, to int64) {
	if m := w.memo.Load(); m != nil && m.from <= t && t < m.to {
		return m.from, m.to
	}
	from, to = w.find(t)
	w.memo.Store(&window{from, to})
	return from, to
}

// around returns the boundaries of the window that t lies in, b1 and b2, of the one before and of the one after.
func (w *tiling) around(t int64) (b0, b1, b2, b3 int64) {
	b1, b2 = w.at(t)
	b0, _ = w.find(b1 - 1)
	_, b3 = w.find(b2)
	return b0, b1, b2, b3
}

// find is at without the memo.
func (w *tiling) find(t int64) (from, to int64) {
	t = clamp(t, latest)
	_, offset := time.UnixMicro(t).In(w.zone).Zone()
	n := w.period.number(floor(t, 1e6) + int64(offset))
	for from = w.begin(n); from > t; from = w.begin(n) {
		n--
	}
	for to = w.begin(n + 1); to <= t; to = w.begin(n + 1) {
		from = to
		n++
	}
	return max(from, 0), to
}

// begin returns when the nth window begins, in µs. It is that of the next where the zone's clock skips the window.
func (w *tiling) begin(n int64) int64 { return w.first(w.period.wall(n)) * 1e6 }

// first returns the first second at which the zone's clock shows wall, or a later time, which comes where the clock is set
// forward. wall is in seconds since the beginning of 1970 on that clock.
func (w *tiling) first(wall int64) int64 {
	const step = 4 * 60 * 60 // no zone changed its offset and changed it back in so short a time
	at := wall - 4*step      // no clock is as far ahead
	offset := w.offset(at)
	for {
		end := at + step
		if w.offset(end) != offset { // a search for the second of the change
			for low := at; end-low > 1; {
				if mid := low + (end-low)/2; w.offset(mid) == offset {
					low = mid
				} else {
					end = mid
				}
			}
		}
		if wall-offset < end {
			return max(wall-offset, at)
		}
		at, offset = end, w.offset(end)
	}
}

// offset returns how many seconds the zone's clock is ahead of UTC.
func (w *tiling) offset(at int64) int64 {
	_, offset := time.Unix(at, 0).In(w.zone).Zone()
	return int64(offset)
}

// zones has the zones of all calendars by name. In a process each has one table, also where that of the machine is replaced
// meanwhile, so that equal specs decide equally.
var zones sync.Map

func loadZone(name string) (*time.Location, error) {
	if zone, known := zones.Load(name); known {
		return zone.(*time.Location), nil
	}
	const accepted = "accepted: UTC, or an IANA name such as Europe/Berlin"
	if name == "" || name == "Local" {
		return nil, invalid("zone is %q; %s", name, accepted)
	}
	loaded, err := time.LoadLocation(name)
	if err != nil {
		return nil, invalid("zone is %s, which cannot be loaded (%.100v); %s; a machine without time zone database needs a program that imports time/tzdata",
			quoted(name), err, accepted)
	}
	zone, _ := zones.LoadOrStore(name, loaded)
	return zone.(*time.Location), nil
}
