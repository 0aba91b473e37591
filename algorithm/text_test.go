package algorithm_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]struct {
		rule quota.Algorithm
		text string // as String writes it; "" for the same
	}{
		"1000 burst 10/s bucket":      {algorithm.TokenBucket(1000, 10, time.Second), ""},
		"1000 burst 10/1s bucket":     {algorithm.TokenBucket(1000, 10, time.Second), "1000 burst 10/s bucket"},
		"1000 burst 10/1000ms bucket": {algorithm.TokenBucket(1000, 10, time.Second), "1000 burst 10/s bucket"},
		"50 burst 21/2s bucket":       {algorithm.TokenBucket(50, 21, 2*time.Second), ""},
		"50 burst 21/11s bucket":      {algorithm.TokenBucket(50, 21, 11*time.Second), ""},
		"0 burst 1/1h1m bucket":       {algorithm.TokenBucket(0, 1, 61*time.Minute), ""},
		"7 burst 3/us bucket":         {algorithm.TokenBucket(7, 3, time.Microsecond), ""},
		"100/1m sliding":              {algorithm.SlidingWindow(100, time.Minute), ""},
		"100/m sliding":               {algorithm.SlidingWindow(100, time.Minute), "100/1m sliding"},
		"100/90s log":                 {algorithm.SlidingWindowLog(100, 90*time.Second), "100/1m30s log"},
		"5000/24h fixed":              {algorithm.FixedWindow(5000, 24*time.Hour), ""},
		"100/1h offset 15m fixed":     {algorithm.FixedWindowOffset(100, time.Hour, 15*time.Minute), ""},
		"100/24h offset 0s fixed":     {algorithm.FixedWindow(100, 24*time.Hour), "100/24h fixed"},
		"0/1ms1us fixed-from-first":   {algorithm.FixedWindowFromFirst(0, 1001*time.Microsecond), ""},
		"10 concurrent 90s":           {algorithm.Concurrency(10, 90*time.Second), "10 concurrent 1m30s"},
		"100/1m log held 5m":          {algorithm.Held(algorithm.SlidingWindowLog(100, time.Minute), 5*time.Minute), ""},
		"9 burst 1/s bucket held 1ms": {algorithm.Held(algorithm.TokenBucket(9, 1, time.Second), time.Millisecond), ""},
		"deny-all":                    {algorithm.DenyAll, ""},
		"unlimited":                   {algorithm.Unlimited, ""},
	} {
		a, err := algorithm.Parse(text)
		if err != nil {
			t.Errorf("Parse(%q): got %v, want nil", text, err)
			continue
		}
		if got, want := a.Spec(), want.rule.Spec(); got != want {
			t.Errorf("Parse(%q): got the spec %+v, want %+v", text, got, want)
		}
		if want.text == "" {
			want.text = text
		}
		if got := fmt.Sprint(a); got != want.text {
			t.Errorf("text of Parse(%q): got %q, want %q", text, got, want.text)
		}
		if got := fmt.Sprint(want.rule); got != want.text {
			t.Errorf("text of the rule of %q: got %q, want %q", text, got, want.text)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	long := strings.Repeat("x", 1000)
	for text, parts := range map[string][]string{
		"":                                     {"rule is", `""`, "100/1m sliding", "1000 burst 10/s bucket", "unlimited"},
		"100/1m":                               {"rule is", `"100/1m"`},
		"100/1m Sliding":                       {"rule is", "fixed-from-first"},
		"100/1m  sliding":                      {"rule is"},
		" 100/1m sliding":                      {"rule is"},
		"100/1m sliding\n":                     {"rule is", `sliding\n`},
		"1000 burst 10/s":                      {"rule is"},
		"1000 Burst 10/s bucket":               {"rule is"},
		"10/s bucket":                          {"rule is", "burst"},
		long:                                   {"rule is", "xx…"},
		"100/1m sliding held":                  {"rule is", "each followed by"},
		"100/1m sliding held 1d":               {"ttl", `"1d"`},
		"100/1m sliding held 1us":              {"ttl is 1µs"},
		"100/1m sliding held 1m held 1m":       {"ttl", `"1m held 1m"`},
		"unlimited held 1m":                    {"keeps no state"},
		"10 concurrent":                        {"rule is"},
		"10 concurrent 1m held 1m":             {"has holds already"},
		"-1 concurrent 1m":                     {"n of rule", `"-1"`},
		"100 sliding":                          {"rate", `"100"`, "100/1m"},
		"100/ sliding":                         {"span", "24h"},
		"100/1d sliding":                       {"span", `"1d"`, "24h"},
		"100/1.5m sliding":                     {"span", `"1.5m"`, "1m30s"},
		"100/-1m sliding":                      {"span", `"-1m"`},
		"100/+1m sliding":                      {"span", `"+1m"`},
		"100/60 sliding":                       {"span", `"60"`},
		"100/1µs sliding":                      {"span", "us"},
		"100/999999999999h sliding":            {"span"},
		"-1/1m sliding":                        {"tokens", `"-1"`, "without sign"},
		"+1/1m sliding":                        {"tokens", `"+1"`},
		"01/1m sliding":                        {"tokens", `"01"`, "leading zeros"},
		"1_000/1m sliding":                     {"tokens", `"1_000"`},
		"1e3/1m sliding":                       {"tokens", `"1e3"`},
		"/1m sliding":                          {"tokens", `""`},
		"9223372036854775808/1m log":           {"tokens", "below 2^63"},
		"x burst 10/s bucket":                  {"burst", `"x"`},
		"10 burst 0/s bucket":                  {"10 burst 0/s bucket", "refill is 0", "at least 1"},
		"9223372036854775807 burst 1/s bucket": {"capacity is 9223372036854775807", "2^52-1"},
		"1/87601h fixed":                       {"1/87601h fixed", "window", "ten years"},
		"1/0s fixed":                           {"window is 0s"},
		"2251799813685247/1ms sliding":         {"rate is", "10^13"},
		"100/1h offset 15x fixed":              {"offset of rule", `"15x"`, "1m30s"},
		"100/1h offset 1h fixed":               {"offset is 1h0m0s", "from 0 to less than the window, 1h0m0s"},
		"100/1h offset 15m sliding":            {"rule is"},
		"100/1h offset 15m fixed-from-first":   {"rule is"},
		"100 offset 15m fixed":                 {"rate"},
	} {
		_, err := algorithm.Parse(text)
		wantInvalid(t, "Parse", text, err, parts...)
	}
	for text, parts := range map[string][]string{
		"tokens":                  {"limit is", `"tokens"`, "tokens: 1000 burst"},
		"tokens:100/1m sliding":   {"limit is"},
		"a b: 100/1m sliding":     {"limit name", `"a b"`},
		"tokens: 100/1x sliding":  {"span", `"1x"`},
		"tokens: : 1/1m sliding":  {"rule is"},
		": 100/1m sliding":        {"limit name"},
		"tokens:  100/1m sliding": {"rule is"},
	} {
		_, err := algorithm.ParseLimit(text)
		wantInvalid(t, "ParseLimit", text, err, parts...)
	}
}

func wantInvalid(t *testing.T, function, text string, err error, parts ...string) {
	t.Helper()
	if !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("%s(%.80q): got %v, want ErrInvalid", function, text, err)
		return
	}
	for _, part := range append(parts, "accepted: ") {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s(%.80q): got %q, want %q in it", function, text, err, part)
		}
	}
	if len(err.Error()) > 500 {
		t.Errorf("%s(%.80q): got an error of %d bytes, want at most 500", function, text, len(err.Error()))
	}
}

// The text of every rule that a constructor makes gives a rule of the same spec, and the same text; so does that of a share.
func TestTextOfRandomRules(t *testing.T) {
	r := random(t)
	made := 0
	for range size(20_000) {
		k := kinds[r.IntN(len(kinds))]
		limit, refill := r.Int64N(1<<r.IntN(53)+1), 1+r.Int64N(1<<r.IntN(40)+1)
		x, err := newRule(k, limit, refill, time.Duration(1+r.Int64N(1<<r.IntN(50)))*time.Microsecond)
		if err != nil {
			continue
		}
		made++
		checkText(t, x.Algorithm)
		share, err := x.Algorithm.(driver.Sharer).Share(1 + r.Int64N(5))
		if err != nil || share.Spec().Capacity == 0 {
			continue
		}
		spec, back := share.Spec(), parse(t, fmt.Sprint(share)).Spec()
		if back.Rule != spec.Rule || back.Capacity != spec.Capacity || back.Window != spec.Window {
			t.Fatalf("Parse(%q), of a share: got %+v, want the rule, capacity and window of %+v", share, back, spec)
		}
	}
	if made < 1000 {
		t.Errorf("rules that could be made: got %d, want 1000 or more", made)
	}
}

func parse(t *testing.T, text string) quota.Algorithm {
	t.Helper()
	a, err := algorithm.Parse(text)
	if err != nil {
		t.Fatalf("Parse(%q): got %v, want a rule", text, err)
	}
	return a
}

func checkText(t *testing.T, a quota.Algorithm) {
	t.Helper()
	text := fmt.Sprint(a)
	back := parse(t, text)
	if back.Spec() != a.Spec() || fmt.Sprint(back) != text {
		t.Fatalf("Parse(%q): got %v with %+v, want the same with %+v", text, back, back.Spec(), a.Spec())
	}
}

// FuzzParse reads texts of all kinds: those that it accepts come back.
func FuzzParse(f *testing.F) {
	for _, text := range []string{"1000 burst 10/s bucket", "100/1m sliding", "100/1m30s log", "5000/24h fixed", "100/1h offset 15m fixed", "100/week Asia/Tokyo anchor sunday at 8h calendar", "1/year UTC anchor april-6 calendar", "1/1us fixed-from-first", "deny-all", "unlimited", "1 burst 1/h1m bucket"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		a, err := algorithm.Parse(text)
		if err == nil {
			checkText(t, a)
		} else if !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("Parse(%q): got %v, want ErrInvalid", text, err)
		}
	})
}

// A program's configuration has rules as text.
func TestTextInJSON(t *testing.T) {
	type plan struct{ Tokens, Calls algorithm.Text }
	const text = `{"Tokens":"1000 burst 10/s bucket","Calls":"unlimited"}`
	var p plan
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	if b, err := json.Marshal(p); err != nil || string(b) != text {
		t.Errorf("Marshal: got %s, %v, want %s", b, err, text)
	}
	err := json.Unmarshal([]byte(`{"Tokens":"1000 burst 10/x bucket"}`), &p)
	wantInvalid(t, "Unmarshal", "10/x", err, "span", `"1x"`)
	_, err = json.Marshal(plan{})
	wantInvalid(t, "Marshal", "no algorithm", err, "<nil>")
}

// The text of a limit, in JSON too, is that of ParseLimit.
func TestTextOfLimits(t *testing.T) {
	for _, text := range []string{"tokens: 1000 burst 10/s bucket", "a.b-c_d: 100/1m sliding", "off: deny-all"} {
		l, err := algorithm.ParseLimit(text)
		if err != nil {
			t.Errorf("ParseLimit(%q): got %v, want nil", text, err)
			continue
		}
		b, err := json.Marshal(map[string]*quota.Limit{"limit": l})
		if want := fmt.Sprintf(`{"limit":%q}`, text); l.String() != text || err != nil || string(b) != want {
			t.Errorf("text of ParseLimit(%q): got %q and %s, %v", text, l, b, err)
		}
	}
}

// A spec tells the time in which the whole capacity comes back: in it an exhausted key has its capacity again, and not
// sooner, but for windows, which may be nearly over and have at most one more to go.
func TestWindowOfSpec(t *testing.T) {
	r := random(t)
	for range size(2000) {
		k := kinds[r.IntN(len(kinds))]
		x, err := newRule(k, 1+r.Int64N(1000), 1+r.Int64N(100), time.Duration(1+r.Int64N(1e9))*time.Microsecond)
		if err != nil {
			continue
		}
		spec, now := x.Spec(), quota.Micros(base)
		if k != bucket && spec.Window != time.Duration(x.period)*time.Microsecond {
			t.Fatalf("%v: window: got %v, want that of the rule", x.Algorithm, spec.Window)
		}
		s, _ := x.Decide(quota.State{}, quota.Request{Cost: spec.Capacity}, now)
		_, v := x.Decide(s, quota.Request{Op: quota.OpPeek, Cost: spec.Capacity}, now)
		least, most := spec.Window, spec.Window
		switch k {
		case bucket:
			least -= time.Duration(x.tick) * time.Microsecond
		case fixed, offset, sliding:
			least, most = 0, 2*spec.Window
		}
		if got := v.RetryAfter.Duration(); got < least || got > most {
			t.Fatalf("%v: capacity after its use: got it after %v, want %v to %v", x.Algorithm, got, least, most)
		}
	}
	for _, a := range []quota.Algorithm{algorithm.DenyAll, algorithm.Unlimited} {
		if got := a.Spec().Window; got != 0 {
			t.Errorf("window of %v: got %v, want 0", a, got)
		}
	}
}

func TestRateOfLimits(t *testing.T) {
	for text, want := range map[string]struct {
		window time.Duration
		rate   float64
	}{
		"n: 1000 burst 10/s bucket": {100 * time.Second, 10},
		"n: 100/1m sliding":         {time.Minute, 100.0 / 60},
		"n: 60/1m log":              {time.Minute, 1},
		"n: 86400/24h fixed":        {24 * time.Hour, 1},
		"n: 0/1m fixed":             {time.Minute, 0},
		"n: deny-all":               {0, 0},
		"n: unlimited":              {0, math.Inf(1)},
	} {
		l := quota.Must(algorithm.ParseLimit(text))
		if l.Window() != want.window || l.Rate() != want.rate {
			t.Errorf("%s: got a window of %v and %v a second, want %v and %v", text, l.Window(), l.Rate(), want.window, want.rate)
		}
		if got := l.Capacity(); got != l.Spec().Capacity {
			t.Errorf("%s: capacity: got %d, want %d", text, got, l.Spec().Capacity)
		}
	}
}
