package algorithm

import (
	"encoding"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// forms are the texts that Parse reads.
const forms = `"100/1m sliding", "100/1m log", "100/24h fixed", "100/24h fixed-from-first", "100/24h offset 8h fixed", "100/month Europe/Berlin anchor 15 at 8h calendar", "1000 burst 10/s bucket", "10 concurrent 1m", "deny-all" or "unlimited", and but for the last three each followed by "held 1m"`

// Parse returns the rule that a text describes. The algorithms of this package have such texts: String and MarshalText
// give them, and Parse of the text of a constructor's rule gives a rule with the same Spec. (A share of a rule, see
// driver.Sharer, has the text of its own capacity and rate; Parse of it may count in another tick.)
//
//	1000 burst 10/s bucket    TokenBucket(1000, 10, time.Second)
//	100/1m sliding            SlidingWindow(100, time.Minute)
//	100/1m log                SlidingWindowLog(100, time.Minute)
//	100/24h fixed             FixedWindow(100, 24*time.Hour)
//	100/24h offset 8h fixed   FixedWindowOffset(100, 24*time.Hour, 8*time.Hour)
//	100/24h fixed-from-first  FixedWindowFromFirst(100, 24*time.Hour)
//	10 concurrent 1m          Concurrency(10, time.Minute)
//	100/1m sliding held 5m    Held(SlidingWindow(100, time.Minute), 5*time.Minute), and so for all rules above but Concurrency
//	deny-all                  DenyAll
//	unlimited                 Unlimited
//
//	100/day UTC calendar                            Calendar(100, Daily())
//	100/week Asia/Tokyo anchor sunday calendar      Calendar(100, Weekly(time.Sunday).In("Asia/Tokyo"))
//	100/month Europe/Berlin anchor 15 calendar      Calendar(100, Monthly(15).In("Europe/Berlin"))
//	100/year UTC anchor april-6 at 8h calendar      Calendar(100, Yearly(time.April, 6).At(8))
//
// Without an anchor a week begins on monday, a month on its first day and a year on january-1.
//
// A number is of decimal digits. A span has whole numbers of h, m, s, ms and us, such as 24h or 1m30s, and is one of a unit
// where it has no number: 10/s is 10/1s. One space stands between words, in lower case. Any other text is
// [quota.ErrInvalid], and so are numbers that the constructor refuses.
func Parse(text string) (quota.Algorithm, error) {
	rule, ttl, isHeld := strings.Cut(text, " held ")
	inner, err := parseRule(rule)
	if err != nil || !isHeld {
		return inner, err
	}
	d, err := parseSpan(text, "ttl", ttl)
	if err != nil {
		return nil, err
	}
	return parsed(text)(makeHeld(inner, d))
}

// parseRule reads a rule without holds, or that of Concurrency.
func parseRule(text string) (quota.Algorithm, error) {
	switch text {
	case "deny-all":
		return DenyAll, nil
	case "unlimited":
		return Unlimited, nil
	}
	words := strings.Split(text, " ")
	if n := len(words); n == 4 && words[1] == "burst" && words[3] == "bucket" {
		capacity, err := parseNumber(text, "burst", words[0])
		if err != nil {
			return nil, err
		}
		refill, period, err := parseRate(text, words[2])
		if err != nil {
			return nil, err
		}
		return parsed(text)(makeTokenBucket(capacity, refill, period))
	} else if n == 4 && words[1] == "offset" && words[3] == "fixed" {
		limit, span, err := parseRate(text, words[0])
		if err != nil {
			return nil, err
		}
		offset, err := parseSpan(text, "offset", words[2])
		if err != nil {
			return nil, err
		}
		return parsed(text)(makeFixedWindowOffset(limit, span, offset))
	} else if n > 2 && words[n-1] == "calendar" {
		number, each, _ := strings.Cut(words[0], "/")
		limit, err := parseNumber(text, "tokens", number)
		if err != nil {
			return nil, err
		}
		period, err := parsePeriod(text, append([]string{each}, words[1:n-1]...))
		if err != nil {
			return nil, err
		}
		return parsed(text)(makeCalendar(limit, period))
	} else if n == 3 && words[1] == "concurrent" {
		tokens, err := parseNumber(text, "n", words[0])
		if err != nil {
			return nil, err
		}
		ttl, err := parseSpan(text, "ttl", words[2])
		if err != nil {
			return nil, err
		}
		return parsed(text)(makeConcurrency(tokens, ttl))
	} else if n == 2 {
		if window := windows[words[1]]; window != nil {
			limit, span, err := parseRate(text, words[0])
			if err != nil {
				return nil, err
			}
			return parsed(text)(window(limit, span))
		}
	}
	return nil, invalid("rule is %s; accepted: %s", quoted(text), forms)
}

// windows are the constructors of the rules with a window, by their word.
var windows = map[string]func(limit int64, window time.Duration) (quota.Algorithm, error){
	"sliding": makeSlidingWindow, "log": makeSlidingWindowLog, "fixed": makeFixedWindow, "fixed-from-first": makeFixedWindowFromFirst,
}

// parsed returns a function that names the text in a constructor's error.
func parsed(text string) func(quota.Algorithm, error) (quota.Algorithm, error) {
	return func(a quota.Algorithm, err error) (quota.Algorithm, error) {
		if err != nil {
			return nil, fmt.Errorf("rule %s: %w", quoted(text), err)
		}
		return a, nil
	}
}

// parseRate reads a number of tokens in a span, such as 100/1m.
func parseRate(text, rate string) (int64, time.Duration, error) {
	number, span, ok := strings.Cut(rate, "/")
	if !ok {
		return 0, 0, invalid("rate of rule %s is %s; accepted: tokens in a span, such as 100/1m", quoted(text), quoted(rate))
	}
	n, err := parseNumber(text, "tokens", number)
	if err != nil {
		return 0, 0, err
	}
	if digits := strings.IndexAny(span, "0123456789"); digits < 0 {
		span = "1" + span
	}
	d, err := parseSpan(text, "span", span)
	return n, d, err
}

// parseSpan reads the span in a field, such as 1m30s.
func parseSpan(text, field, span string) (time.Duration, error) {
	d, err := time.ParseDuration(span)
	if err != nil || strings.Trim(span, "0123456789hmsu") != "" {
		return 0, invalid("%s of rule %s is %s; accepted: whole numbers of h, m, s, ms and us, such as 24h or 1m30s", field, quoted(text), quoted(span))
	}
	return d, nil
}

func parseNumber(text, field, number string) (int64, error) {
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || len(number) > 1 && number[0] == '0' || strings.Contains(number, "_") {
		return 0, invalid("%s of rule %s is %s; accepted: a number such as 1000, without sign and leading zeros, below 2^63", field, quoted(text), quoted(number))
	}
	return int64(n), nil
}

// quoted returns the beginning of a text in quotes.
func quoted(text string) string {
	const most = 64
	if len(text) > most {
		text = text[:most] + "…"
	}
	return strconv.Quote(text)
}

// spanText returns a span of µs in the form that parseRate reads, such as 1m30s.
func spanText(us int64) string {
	var b strings.Builder
	for _, unit := range [...]struct {
		us   int64
		name string
	}{{3600e6, "h"}, {60e6, "m"}, {1e6, "s"}, {1e3, "ms"}, {1, "us"}} {
		if n := us / unit.us; n > 0 {
			us -= n * unit.us
			b.WriteString(strconv.FormatInt(n, 10) + unit.name)
		}
	}
	return b.String()
}

// ParseLimit returns the limit that a text describes: its name and its rule, as [quota.Limit.String] gives them.
//
//	limit, err := algorithm.ParseLimit("tokens: 1000 burst 10/s bucket")
//
// The name is as [quota.NewLimit] wants it, and the rule as [Parse] does; any other text is [quota.ErrInvalid].
func ParseLimit(text string) (*quota.Limit, error) {
	name, rule, ok := strings.Cut(text, ": ")
	if !ok {
		return nil, invalid("limit is %s; accepted: a name and a rule, such as %q", quoted(text), "tokens: 1000 burst 10/s bucket")
	}
	a, err := Parse(rule)
	if err != nil {
		return nil, err
	}
	l := quota.NewLimit(name, a)
	if err := l.Err(); err != nil {
		return nil, err
	}
	return l, nil
}

// A Text is an algorithm as a field of a program's configuration: in JSON, and in other formats that use
// encoding.TextUnmarshaler, it is the text that [Parse] reads.
type Text struct {
	Algorithm quota.Algorithm
}

// UnmarshalText sets the algorithm to that of [Parse].
func (t *Text) UnmarshalText(text []byte) (err error) {
	t.Algorithm, err = Parse(string(text))
	return err
}

// MarshalText returns the text of the algorithm. An algorithm of another package, or none, is [quota.ErrInvalid] unless it
// has such a method too.
func (t Text) MarshalText() ([]byte, error) {
	if m, ok := t.Algorithm.(encoding.TextMarshaler); ok {
		return m.MarshalText()
	}
	return nil, invalid("algorithm is %T, which has no text; accepted: the algorithms of this package", t.Algorithm)
}

// String returns the rule as [Parse] reads it.
func (b *tokenBucket) String() string {
	period := spanText(b.period)
	if unit := strings.TrimLeft(period, "1"); len(unit) == len(period)-1 && !strings.ContainsAny(unit, "0123456789") {
		period = unit // 10/s, for 10/1s
	}
	return fmt.Sprintf("%d burst %d/%s bucket", b.tokens, b.refill, period)
}

func (w *slidingWindow) String() string {
	return fmt.Sprintf("%d/%s sliding", w.limit, spanText(w.window))
}

func (l *slidingLog) String() string { return fmt.Sprintf("%d/%s log", l.limit, spanText(l.window)) }

func (f *fixedWindow) String() string {
	word := "fixed"
	if f.fromFirst {
		word = "fixed-from-first"
	} else if f.offset > 0 {
		word = "offset " + spanText(f.offset) + " fixed"
	}
	return fmt.Sprintf("%d/%s %s", f.limit, spanText(f.window), word)
}

func (c *calendar) String() string {
	return fmt.Sprintf("%d/%s calendar", c.limit, c.windows.period)
}

func (s *stateless) String() string {
	if s.capacity == 0 {
		return "deny-all"
	}
	return "unlimited"
}

// MarshalText returns the text of String.
func (b *tokenBucket) MarshalText() ([]byte, error)   { return []byte(b.String()), nil }
func (w *slidingWindow) MarshalText() ([]byte, error) { return []byte(w.String()), nil }
func (l *slidingLog) MarshalText() ([]byte, error)    { return []byte(l.String()), nil }
func (f *fixedWindow) MarshalText() ([]byte, error)   { return []byte(f.String()), nil }
func (c *calendar) MarshalText() ([]byte, error)      { return []byte(c.String()), nil }
func (s *stateless) MarshalText() ([]byte, error)     { return []byte(s.String()), nil }
