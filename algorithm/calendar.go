package algorithm

import (
	"crypto/sha256"
	"encoding/binary"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// calendar counts in the windows of a calendar, see tiling.
//
// State: Unit is 1, A the window's start, B the count, C the window's end. A window in force lasts to that end whatever zone,
// anchor or release of the time zone database asks. The unit does not change with the window: a new month is not a change of
// the limit's numbers.
type calendar struct {
	limit   int64
	hash    int64 // of the period
	windows *tiling
}

var _ driver.Moving = (*calendar)(nil)

// Calendar returns a rule of limit tokens in each window of a calendar: the days, weeks, months or years of a time zone.
//
//	algorithm.Calendar(5_000_000, algorithm.Monthly(15).In("Europe/Berlin")) // from the 15th to the 15th
//	algorithm.Calendar(10_000, algorithm.Daily().In("Asia/Shanghai"))
//
// Windows follow the zone's clock: a day on which the clock is set forward has 23 hours, and one on which it is set back 25. As
// with [FixedWindow], an interval of a window's length that crosses a boundary may admit twice the limit. For windows of hours
// see [FixedWindowOffset].
//
// The period of a limit may change while it is in use. A window that has begun lasts to its end, with its consumption, where the
// new period has another zone or anchor. Where it has longer or shorter windows, the next charge moves the consumption into the
// present one of them.
//
// Spec.Window is the mean length: 24 hours, 7 days, or the 400th part of 400 years, and a twelfth of that. Accepted: limits of 0,
// which denies every cost above 0, to 2^52-1, and the periods of [Daily], [Weekly], [Monthly] and [Yearly], see there; else
// [quota.ErrInvalid].
func Calendar(limit int64, period Period) quota.Algorithm {
	return carry(makeCalendar(limit, period))
}

func makeCalendar(limit int64, period Period) (quota.Algorithm, error) {
	if limit < 0 || limit > maxHeld {
		return nil, invalid("limit is %d; accepted: 0 to 2^52-1 (%d)", limit, int64(maxHeld))
	}
	zone, err := period.check()
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(period.String()))
	return &calendar{limit: limit, hash: int64(binary.BigEndian.Uint64(sum[:]) >> 12), windows: &tiling{period: period, zone: zone}}, nil
}

func (c *calendar) Spec() quota.Spec {
	return quota.Spec{
		Rule: quota.Rule{'c', 'a', '1'}, Unit: 1, Capacity: c.limit, Debt: maxHeld - c.limit,
		Window: time.Duration(c.windows.period.each.mean()) * time.Second,
		Params: [8]int64{c.limit, c.hash},
	}
}

// ParamsAt returns the limit and the four boundaries of three windows, of which now lies in the second. They serve up to a second
// before the last boundary: a state may be ahead of the clock by that.
func (c *calendar) ParamsAt(now quota.Micros) (params [8]int64, from, to quota.Micros) {
	b0, b1, b2, b3 := c.windows.around(int64(now))
	return [8]int64{c.limit, b0, b1, b2, b3}, quota.Micros(b0), quota.Micros(b3) - ahead
}

func (c *calendar) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	t := int64(now)
	var v quota.Verdict
	start, end := c.windows.at(t)
	length, count := end-start, int64(0)
	if !s.IsZero() {
		if quota.Micros(s.A)-now > ahead {
			s.A, s.C, v.Write = start, end, true
		}
		if s.B > 0 && t < s.C {
			start, end, count = s.A, s.C, min(s.B, maxHeld)
		}
	}

	kept := inWindow(r, c.limit, count, start, end, t, &v)
	if r.Op == quota.OpReset {
		v.Write = !s.IsZero()
	}
	switch {
	case kept == 0 && (kept != count || r.Op == quota.OpReset):
		s, v.Write = quota.State{}, v.Write || kept != count
	case kept != count:
		// Windows of one period differ by less than half, and those of the next period are more than twice as long.
		if is := end - start; kept > count && count > 0 && (is > 2*length || 2*is < length) {
			start, end = c.windows.at(max(t, start))
		}
		s, v.Write = quota.State{Unit: 1, A: start, B: kept, C: end}, true
	}
	v.Remaining = c.limit - kept
	if kept > 0 {
		v.ResetAfter = quota.Micros(end - t)
	}
	return s, v
}

// Forecast counts one limit in each window: in the next ones exactly, and by the shortest that there is behind those.
func (c *calendar) Forecast(d quota.Decision, n int64) time.Duration {
	more := n - max(d.Remaining, 0)
	if more <= 0 {
		return 0
	}
	if c.limit == 0 {
		return quota.Never
	}
	at := int64(d.At)
	if d.ResetAfter > 0 { // the window in force may be that of another period
		at += int64(d.ResetAfter / time.Microsecond)
	} else {
		_, at = c.windows.at(at)
	}
	windows := (more - 1) / c.limit
	for n := 0; n < 16 && windows > 0 && at < latest; n++ {
		_, at = c.windows.find(at)
		windows--
	}
	return later(quota.Micros(at-int64(d.At)).Duration(), windows, c.windows.period.each.least()*1e6)
}

// Share counts in the same windows.
func (c *calendar) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return c, nil
	}
	share := *c
	share.limit /= n
	return &share, nil
}
