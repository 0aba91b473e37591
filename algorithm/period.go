package algorithm

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Period says when the windows of a [Calendar] begin. [Daily], [Weekly], [Monthly] and [Yearly] make one: in UTC, unless In
// names another zone, and at midnight, unless At names another hour. Bad values are told by the limit, see [quota.Limit.Err]. The
// zero Period is not valid. Periods are comparable.
type Period struct {
	each    each
	weekday time.Weekday // of a week
	month   time.Month   // of a year
	day     int          // of a month or a year
	hour    int
	zone    string
}

// each is the unit of a period; 0 is none.
type each uint8

const (
	day each = 1 + iota
	week
	month
	year
)

var eachNames = [...]string{"", "day", "week", "month", "year"}

const dayLength = 24 * 60 * 60 // seconds

// mean returns the mean length of a window in seconds.
func (e each) mean() int64 {
	return [...]int64{0, dayLength, 7 * dayLength, 146097 * dayLength / 4800, 146097 * dayLength / 400}[e]
}

// least returns a length that no window is shorter than, in seconds. The shortest day since 1970 had 17 hours, at Vostok.
func (e each) least() int64 {
	return [...]int64{0, 16 * 60 * 60, 6 * dayLength, 27 * dayLength, 364 * dayLength}[e]
}

// Daily returns the period of windows that begin each day.
func Daily() Period { return Period{each: day, zone: "UTC"} }

// Weekly returns the period of windows that begin each week on a weekday, such as time.Monday.
func Weekly(weekday time.Weekday) Period { return Period{each: week, weekday: weekday, zone: "UTC"} }

// Monthly returns the period of windows that begin each month on a day, 1 to 31. In a month with fewer days they begin on its last.
func Monthly(day int) Period { return Period{each: month, day: day, zone: "UTC"} }

// Yearly returns the period of windows that begin each year on a day of a month, such as time.April, 6. The day may be 1 to 31; in
// a year in which the month has fewer days the window begins on its last.
func Yearly(month time.Month, day int) Period {
	return Period{each: year, month: month, day: day, zone: "UTC"}
}

// In returns the period in the time zone with an IANA name, such as Europe/Berlin. All processes that use the limit must name the
// same zone. A zone that the machine cannot load is refused; a program that imports time/tzdata can load all of them.
func (p Period) In(zone string) Period {
	p.zone = zone
	return p
}

// At returns the period with windows that begin at an hour of the zone's clock, 0 to 23.
func (p Period) At(hour int) Period {
	p.hour = hour
	return p
}

// check returns the zone of a period.
func (p Period) check() (*time.Location, error) {
	switch {
	case p.each == 0:
		return nil, invalid("period is the zero Period; accepted: one that Daily, Weekly, Monthly or Yearly returns")
	case p.weekday < time.Sunday || p.weekday > time.Saturday:
		return nil, invalid("weekday is %d; accepted: time.Sunday (0) to time.Saturday (6)", int(p.weekday))
	case p.each == year && (p.month < time.January || p.month > time.December):
		return nil, invalid("month is %d; accepted: time.January (1) to time.December (12)", int(p.month))
	case p.each >= month && (p.day < 1 || p.day > 31):
		return nil, invalid("day is %d; accepted: 1 to 31", p.day)
	case p.hour < 0 || p.hour > 23:
		return nil, invalid("hour is %d; accepted: 0 to 23", p.hour)
	}
	return loadZone(p.zone)
}

// wall returns what the zone's clock shows when the nth window begins, in seconds since the beginning of 1970 on that clock. The
// 0th begins in that week, month or year.
func (p Period) wall(n int64) int64 {
	days := n
	switch p.each {
	case week:
		days = 7*n + p.weekShift()
	case month:
		days = date(1970, 1+n, p.day)
	case year:
		days = date(1970+n, int64(p.month), p.day)
	}
	return days*dayLength + int64(p.hour)*60*60
}

// number returns the number of a window that begins near a time of the zone's clock.
func (p Period) number(wall int64) int64 {
	days := floor(wall, dayLength)
	t := time.Unix(wall, 0).UTC()
	switch p.each {
	case week:
		return floor(days-p.weekShift(), 7)
	case month:
		return 12*(int64(t.Year())-1970) + int64(t.Month()) - 1
	case year:
		return int64(t.Year()) - 1970
	}
	return days
}

// weekShift returns how many days after the first of January 1970, a Thursday, the 0th week begins.
func (p Period) weekShift() int64 { return int64(p.weekday - time.Thursday) }

// date returns the days from the first of January 1970 to a day of a month, but to the last of the month if that comes before.
func date(year, month int64, day int) int64 {
	last := time.Date(int(year), time.Month(month)+1, 0, 0, 0, 0, 0, time.UTC)
	return floor(last.Unix(), dayLength) - int64(max(last.Day()-day, 0))
}

// String returns the period as it stands in the text of a calendar, such as "month Europe/Berlin anchor 15 at 8h".
func (p Period) String() string {
	text := eachNames[p.each] + " " + p.zone
	switch {
	case p.each == week && p.weekday != time.Monday:
		text += " anchor " + strings.ToLower(p.weekday.String())
	case p.each == month && p.day != 1:
		text += fmt.Sprintf(" anchor %d", p.day)
	case p.each == year && (p.month != time.January || p.day != 1):
		text += fmt.Sprintf(" anchor %s-%d", strings.ToLower(p.month.String()), p.day)
	}
	if p.hour != 0 {
		text += fmt.Sprintf(" at %dh", p.hour)
	}
	return text
}

// parsePeriod reads the words of String.
func parsePeriod(text string, words []string) (Period, error) {
	p := Period{each: each(max(slices.Index(eachNames[:], words[0]), 0)), weekday: time.Monday, month: time.January, day: 1, zone: words[1]}
	if p.each == 0 {
		return p, invalid("period of rule %s is %s; accepted: day, week, month or year", quoted(text), quoted(words[0]))
	}
	if p.each != week {
		p.weekday = 0
	}
	if p.each != year {
		p.month = 0
	}
	if p.each < month {
		p.day = 0
	}
	words = words[2:]
	if len(words) >= 2 && words[0] == "anchor" {
		if !p.parseAnchor(words[1]) {
			return p, invalid("anchor of rule %s is %s; accepted: of a week a day such as monday, of a month one from 1 to 31, of a year one such as april-6",
				quoted(text), quoted(words[1]))
		}
		words = words[2:]
	}
	if len(words) >= 2 && words[0] == "at" {
		hour, ok := strings.CutSuffix(words[1], "h")
		if p.hour, ok = parseSmall(hour, ok); !ok {
			return p, invalid("hour of rule %s is %s; accepted: 0h to 23h", quoted(text), quoted(words[1]))
		}
		words = words[2:]
	}
	if len(words) > 0 {
		return p, invalid("rule is %s; accepted: %s", quoted(text), forms)
	}
	return p, nil
}

// parseAnchor reads the anchor of a period.
func (p *Period) parseAnchor(text string) (ok bool) {
	switch p.each {
	case week:
		for p.weekday = time.Sunday; p.weekday <= time.Saturday; p.weekday++ {
			if strings.ToLower(p.weekday.String()) == text {
				return true
			}
		}
	case month:
		p.day, ok = parseSmall(text, true)
	case year:
		name, number, found := strings.Cut(text, "-")
		for p.month = time.January; p.month <= time.December; p.month++ {
			if strings.ToLower(p.month.String()) == name {
				p.day, ok = parseSmall(number, found)
				return ok
			}
		}
	}
	return ok
}

// parseSmall reads a number of one or two digits.
func parseSmall(text string, ok bool) (int, bool) {
	n, err := strconv.ParseUint(text, 10, 7)
	return int(n), ok && err == nil && text == strconv.FormatUint(n, 10)
}
