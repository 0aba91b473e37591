package algorithm_test

import (
	"archive/zip"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	_ "time/tzdata"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// windowAt returns the window of a calendar that a time lies in, in µs.
func windowAt(a quota.Algorithm, t int64) (from, to int64) {
	params, _, _ := a.(driver.Moving).ParamsAt(quota.Micros(t))
	return params[2], params[3]
}

func TestCalendarConformance(t *testing.T) {
	eval := eval(t)
	for name, of := range map[string][]quota.Algorithm{
		"months and days": {
			algorithm.Calendar(10, algorithm.Monthly(31).In("Europe/Berlin")),
			algorithm.Calendar(1000, algorithm.Daily().In("America/Santiago")),
			algorithm.Calendar(10, algorithm.Monthly(15).In("Europe/Berlin").At(8)),
			algorithm.Calendar(0, algorithm.Daily()),
		},
		"weeks and years": {
			algorithm.Calendar(1<<52-1, algorithm.Weekly(time.Sunday).In("Asia/Shanghai")),
			algorithm.Calendar(7, algorithm.Yearly(time.February, 29).In("Pacific/Apia").At(23)),
			algorithm.Calendar(7, algorithm.Weekly(time.Monday)),
		},
		"held": {
			algorithm.Held(algorithm.Calendar(10, algorithm.Monthly(31).In("Europe/Berlin")), time.Minute),
			algorithm.Held(algorithm.Calendar(1000, algorithm.Daily().In("America/Santiago")), time.Hour),
		},
	} {
		t.Run(name, func(t *testing.T) {
			var boundaries [][]time.Time
			if name == "months and days" {
				boundaries = [][]time.Time{
					times("2027-01-31T00:00:00+01:00", "2027-02-28T00:00:00+01:00", "2027-03-31T00:00:00+02:00"),
					times("2027-09-04T00:00:00-04:00", "2027-09-05T01:00:00-03:00", "2027-09-06T00:00:00-03:00"),
				}
			}
			if testenv.Race && !testenv.Full() {
				of = of[:1]
			}
			conformance.Algorithm(t, conformance.AlgorithmHarness{Algorithms: of, Eval: eval, Boundaries: boundaries})
		})
	}
}

// times returns times in the form of RFC 3339.
func times(texts ...string) (all []time.Time) {
	for _, text := range texts {
		all = append(all, quota.Must(time.Parse(time.RFC3339, text)))
	}
	return all
}

// Boundaries that were looked up: each two neighbours are a window.
func TestCalendarWindows(t *testing.T) {
	for _, test := range []struct {
		name   string
		period algorithm.Period
		want   []string
	}{
		{"days of UTC", algorithm.Daily(), []string{"2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"}},
		{"days of 24 and 23 hours", algorithm.Daily().In("Europe/Berlin"), []string{"2027-03-27T00:00:00+01:00", "2027-03-28T00:00:00+01:00", "2027-03-29T00:00:00+02:00"}},
		{"a day of 25 hours", algorithm.Daily().In("Europe/Berlin"), []string{"2027-10-31T00:00:00+02:00", "2027-11-01T00:00:00+01:00"}},
		{"a day of 25 hours from 8 to 8", algorithm.Daily().In("Europe/Berlin").At(8), []string{"2027-10-30T08:00:00+02:00", "2027-10-31T08:00:00+01:00"}},
		{"an hour that does not exist", algorithm.Daily().In("Europe/Berlin").At(2), []string{"2027-03-27T02:00:00+01:00", "2027-03-28T03:00:00+02:00", "2027-03-29T02:00:00+02:00"}},
		{"an hour that comes twice", algorithm.Daily().In("Europe/Berlin").At(2), []string{"2027-10-30T02:00:00+02:00", "2027-10-31T02:00:00+02:00", "2027-11-01T02:00:00+01:00"}},
		{"days of 23.5 and 24.5 hours", algorithm.Daily().In("Australia/Lord_Howe"), []string{"2026-04-05T00:00:00+11:00", "2026-04-06T00:00:00+10:30"}},
		{"days of 23.5 hours", algorithm.Daily().In("Australia/Lord_Howe"), []string{"2026-10-04T00:00:00+10:30", "2026-10-05T00:00:00+11:00"}},
		{"a midnight that does not exist", algorithm.Daily().In("America/Santiago"), []string{"2027-09-04T00:00:00-04:00", "2027-09-05T01:00:00-03:00", "2027-09-06T00:00:00-03:00"}},
		{"a midnight that comes twice", algorithm.Daily().In("America/Havana"), []string{"2027-11-07T00:00:00-04:00", "2027-11-08T00:00:00-05:00"}},
		{"a minute of the next day, and an hour of the old one again", algorithm.Daily().In("America/Goose_Bay"), []string{"2010-11-06T00:00:00-03:00", "2010-11-07T00:00:00-03:00", "2010-11-08T00:00:00-04:00"}},
		{"a day that does not exist", algorithm.Daily().In("Pacific/Apia"), []string{"2011-12-29T00:00:00-10:00", "2011-12-31T00:00:00+14:00", "2012-01-01T00:00:00+14:00"}},
		{"the end of a leap year", algorithm.Daily().In("America/Adak"), []string{"2040-12-29T00:00:00-10:00", "2040-12-30T00:00:00-10:00", "2040-12-31T00:00:00-10:00", "2041-01-01T00:00:00-10:00"}},
		{"weeks from Monday", algorithm.Weekly(time.Monday).In("Asia/Shanghai"), []string{"2026-11-23T00:00:00+08:00", "2026-11-30T00:00:00+08:00"}},
		{"weeks from Sunday", algorithm.Weekly(time.Sunday), []string{"1970-01-04T00:00:00Z", "1970-01-11T00:00:00Z"}},
		{"months", algorithm.Monthly(1).In("Asia/Shanghai"), []string{"2026-11-01T00:00:00+08:00", "2026-12-01T00:00:00+08:00", "2027-01-01T00:00:00+08:00"}},
		{"months from the 31st", algorithm.Monthly(31).In("Europe/Berlin"), []string{"2027-01-31T00:00:00+01:00", "2027-02-28T00:00:00+01:00", "2027-03-31T00:00:00+02:00", "2027-04-30T00:00:00+02:00", "2027-05-31T00:00:00+02:00"}},
		{"months from the 30th of a leap year", algorithm.Monthly(30), []string{"2028-01-30T00:00:00Z", "2028-02-29T00:00:00Z", "2028-03-30T00:00:00Z"}},
		{"years from the 29th of February", algorithm.Yearly(time.February, 29), []string{"2027-02-28T00:00:00Z", "2028-02-29T00:00:00Z", "2029-02-28T00:00:00Z"}},
		{"years from the 6th of April", algorithm.Yearly(time.April, 6).In("Europe/London"), []string{"2026-04-06T00:00:00+01:00", "2027-04-06T00:00:00+01:00"}},
	} {
		a := algorithm.Calendar(10, test.period)
		for i := 1; i < len(test.want); i++ {
			begin, end := quota.Must(time.Parse(time.RFC3339, test.want[i-1])).UnixMicro(), quota.Must(time.Parse(time.RFC3339, test.want[i])).UnixMicro()
			for _, at := range []int64{begin, (begin + end) / 2, end - 1} {
				if from, to := windowAt(a, at); from != begin || to != end {
					t.Errorf("%s: window of %v: got %v to %v, want %v to %v", test.name, time.UnixMicro(at).UTC(), time.UnixMicro(from).UTC(), time.UnixMicro(to).UTC(), test.want[i-1], test.want[i])
				}
			}
		}
	}
}

// zoneNames returns the names of all zones that the Go release has.
func zoneNames(t *testing.T) (names []string) {
	t.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	files, err := zip.OpenReader(filepath.Join(strings.TrimSpace(string(root)), "lib", "time", "zoneinfo.zip"))
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	for _, f := range files.File {
		if !strings.HasSuffix(f.Name, "/") {
			names = append(names, f.Name)
		}
	}
	if len(names) < 400 {
		t.Fatalf("zones: got %d, want 400 or more", len(names))
	}
	return names
}

// oddZones have most of what can happen to a day.
var oddZones = []string{
	"UTC", "Europe/Berlin", "Europe/London", "Europe/Dublin", "America/New_York", "America/Adak", "America/Santiago", "America/Havana", "America/Goose_Bay",
	"America/Sao_Paulo", "America/Godthab", "Asia/Shanghai", "Asia/Kathmandu", "Asia/Beirut", "Asia/Gaza", "Africa/Casablanca", "Australia/Lord_Howe",
	"Pacific/Apia", "Pacific/Kwajalein", "Antarctica/Troll",
}

var (
	century = time.Date(1970, 1, 2, 0, 0, 0, 0, time.UTC).Unix()
	centEnd = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC).Unix()
)

// changes returns the seconds at which a zone's clock is changed, from 1970 to 2100, by steps of an hour in full runs and of six
// hours else, each with a search.
func changes(zone *time.Location) (all []int64) {
	offset := func(t int64) int { _, o := time.Unix(t, 0).In(zone).Zone(); return o }
	step := int64(testenv.Sized(6, 1) * 60 * 60)
	before := offset(century)
	for at := century; at < centEnd; at += step {
		after := offset(at + step)
		if after == before {
			continue
		}
		low, high := at, at+step
		for high-low > 1 {
			if mid := low + (high-low)/2; offset(mid) == before {
				low = mid
			} else {
				high = mid
			}
		}
		all = append(all, high)
		before = after
	}
	return all
}

// eachZone runs a test for 20 zones, or for all of them in a full run.
func eachZone(t *testing.T, test func(zone *time.Location, rng *rand.Rand) error) {
	t.Helper()
	names := oddZones
	if testenv.Full() {
		names = zoneNames(t)
	}
	seed := testenv.Seed(t)
	var wg sync.WaitGroup
	some := make(chan struct{}, runtime.GOMAXPROCS(0))
	for i, name := range names {
		some <- struct{}{}
		wg.Go(func() {
			defer func() { <-some }()
			zone, err := time.LoadLocation(name)
			if err == nil {
				err = test(zone, rand.New(rand.NewPCG(seed, uint64(i))))
			}
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	wg.Wait()
}

// Windows follow each other without gap and overlap, whatever time within one is asked for: in a full run all from 1970 to 2100,
// else a stretch of each.
func TestCalendarTiles(t *testing.T) {
	eachZone(t, func(zone *time.Location, rng *rand.Rand) error {
		name := zone.String()
		for i, c := range []struct {
			period  algorithm.Period
			least   time.Duration
			windows int // of a stretch
		}{
			{algorithm.Daily().In(name), 16 * time.Hour, 600},
			{algorithm.Daily().In(name).At(rng.IntN(24)), 16 * time.Hour, 600},
			{algorithm.Weekly(time.Weekday(rng.IntN(7))).In(name).At(rng.IntN(24)), 6 * 24 * time.Hour, 200},
			{algorithm.Monthly(1).In(name), 27 * 24 * time.Hour, 100},
			{algorithm.Monthly(1 + rng.IntN(31)).In(name).At(rng.IntN(24)), 27 * 24 * time.Hour, 100},
			{algorithm.Yearly(time.Month(1+rng.IntN(12)), 1+rng.IntN(31)).In(name), 364 * 24 * time.Hour, 20},
		} {
			a := algorithm.Calendar(10, c.period)
			at, windows := century*1e6, -1
			if !testenv.Full() || i == 1 {
				at, windows = at+rng.Int64N((centEnd-century)*1e6), c.windows/3
			}
			_, end := windowAt(a, at)
			for ; windows != 0 && end < centEnd*1e6; windows-- { // three windows at once
				_, second := windowAt(a, end)
				params, _, _ := a.(driver.Moving).ParamsAt(quota.Micros(second))
				for i := 1; i < 4; i++ {
					from, to := params[i], params[i+1]
					if from != end || to-from < c.least.Microseconds() {
						return fmt.Errorf("window of %v: got %d to %d, want one from %d, not shorter than %v", c.period, from, to, end, c.least)
					}
					end = to
					if testenv.Full() && rng.IntN(16) > 0 {
						continue
					}
					other := algorithm.Calendar(10, c.period)
					for _, at := range []int64{to - 1, from + rng.Int64N(to-from), from} {
						if f, e := windowAt(other, at); f != from || e != to {
							return fmt.Errorf("window of %v at %d: got %d to %d, want %d to %d", c.period, at, f, e, from, to)
						}
					}
				}
			}
		}
		return nil
	})
}

// Near each change of a zone's clock days begin at the first second at which its clock shows that day's hour, or a later one,
// as a search over all half minutes says. Elsewhere they are 24 hours apart.
func TestCalendarBoundaries(t *testing.T) {
	eachZone(t, func(zone *time.Location, rng *rand.Rand) error {
		shows := func(t int64) int64 { // what the clock shows
			_, o := time.Unix(t, 0).In(zone).Zone()
			return t + int64(o)
		}
		odd := changes(zone)
		if n := len(odd); !testenv.Full() && n > 40 {
			rng.Shuffle(n, func(i, j int) { odd[i], odd[j] = odd[j], odd[i] })
			odd = odd[:40]
		}
		for _, hour := range []int{0, rng.IntN(24)} {
			a := algorithm.Calendar(10, algorithm.Daily().In(zone.String()).At(hour))
			for _, change := range odd {
				// A boundary is where the highest that the clock ever showed passes the hour of a day.
				begin, end := change-36*3600, change+36*3600
				highest := int64(-1 << 62)
				var want []int64
				see := func(at int64) {
					now := shows(at)
					if at > begin && (now-int64(hour)*3600)/86400 > (highest-int64(hour)*3600)/86400 {
						want = append(want, at)
					}
					highest = max(highest, now)
				}
				half := func(at int64) int64 { return at / 30 * 30 } // offsets since 1972 are of whole half minutes
				for at := half(begin - 24*3600); at < change; at += 30 {
					see(at)
				}
				for at := change; at <= end; at = half(at) + 30 {
					see(at)
				}
				var got []int64
				for at := begin * 1e6; ; {
					if _, at = windowAt(a, at); at > end*1e6 {
						break
					}
					got = append(got, at/1e6)
				}
				if !slices.Equal(got, want) && len(want) > 0 && want[0] > begin+30 && want[len(want)-1] < end-30 {
					return fmt.Errorf("days at %d o'clock near the change at %d: got boundaries %d, want %d", hour, change, got, want)
				}
			}
		}
		return nil
	})
}

func TestCalendarRefuses(t *testing.T) {
	for _, test := range []struct {
		rule quota.Algorithm
		says []string
	}{
		{algorithm.Calendar(-1, algorithm.Daily()), []string{"limit is -1", "0 to 2^52-1"}},
		{algorithm.Calendar(1<<52, algorithm.Daily()), []string{"limit is 4503599627370496"}},
		{algorithm.Calendar(1, algorithm.Period{}), []string{"period is the zero Period", "Daily, Weekly, Monthly or Yearly"}},
		{algorithm.Calendar(1, algorithm.Period{}.In("UTC")), []string{"period is the zero Period"}},
		{algorithm.Calendar(1, algorithm.Weekly(7)), []string{"weekday is 7", "time.Saturday (6)"}},
		{algorithm.Calendar(1, algorithm.Weekly(-1)), []string{"weekday is -1"}},
		{algorithm.Calendar(1, algorithm.Monthly(0)), []string{"day is 0", "1 to 31"}},
		{algorithm.Calendar(1, algorithm.Monthly(32)), []string{"day is 32"}},
		{algorithm.Calendar(1, algorithm.Yearly(0, 1)), []string{"month is 0", "time.December (12)"}},
		{algorithm.Calendar(1, algorithm.Yearly(13, 1)), []string{"month is 13"}},
		{algorithm.Calendar(1, algorithm.Yearly(time.May, 0)), []string{"day is 0"}},
		{algorithm.Calendar(1, algorithm.Daily().At(24)), []string{"hour is 24", "0 to 23"}},
		{algorithm.Calendar(1, algorithm.Daily().At(-1)), []string{"hour is -1"}},
		{algorithm.Calendar(1, algorithm.Daily().In("")), []string{`zone is ""`, "UTC"}},
		{algorithm.Calendar(1, algorithm.Daily().In("Local")), []string{`zone is "Local"`, "Europe/Berlin"}},
		{algorithm.Calendar(1, algorithm.Daily().In("Mars/Olympus")), []string{`zone is "Mars/Olympus"`, "cannot be loaded", "time/tzdata"}},
		{algorithm.Calendar(1, algorithm.Daily().In(strings.Repeat("x", 1000))), []string{"zone is", "xx…", "time/tzdata"}},
		{algorithm.FixedWindowOffset(1, time.Hour, time.Hour), []string{"offset is 1h0m0s", "from 0 to less than the window, 1h0m0s"}},
		{algorithm.FixedWindowOffset(1, time.Hour, -time.Second), []string{"offset is -1s"}},
		{algorithm.FixedWindowOffset(1, time.Hour, time.Nanosecond), []string{"offset is 1ns", "whole microseconds"}},
		{algorithm.FixedWindowOffset(1, 0, 0), []string{"window is 0s"}},
	} {
		err := quota.NewLimit("n", test.rule).Err()
		wantInvalid(t, "NewLimit", test.says[0], err, test.says...)
	}
}

// Where a period has another zone or anchor, the window in force lasts to its end; where it has longer or shorter windows, the
// next charge moves the count.
func TestCalendarChanges(t *testing.T) {
	const day = 24 * 60 * 60 * int64(second)
	start := time.Date(2027, 6, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
	june := start + 30*day
	month := func(p algorithm.Period) quota.Algorithm { return algorithm.Calendar(10, p) }
	for _, test := range []struct {
		name string
		to   quota.Algorithm
		end  int64 // of the count after the next charge
	}{
		{"the same", month(algorithm.Monthly(1)), june},
		{"another anchor", month(algorithm.Monthly(15)), june},
		{"a zone where the month is over sooner", month(algorithm.Monthly(1).In("Asia/Shanghai")), june},
		{"a zone where the month is over later", month(algorithm.Monthly(1).In("America/New_York")), june},
		{"another hour", month(algorithm.Monthly(1).At(8)), june},
		{"days", month(algorithm.Daily()), start + 21*day},
		{"weeks from Sunday", month(algorithm.Weekly(time.Sunday)), start + 26*day},
		{"years", month(algorithm.Yearly(time.January, 1)), start + 214*day},
	} {
		var c cell
		c.take(rule{Algorithm: month(algorithm.Monthly(1))}, 7, start+day)
		now, to := start+20*day+day/2, rule{Algorithm: test.to}
		if v := c.take(to, 4, now); v.Allowed || v.Remaining != 3 || int64(v.RetryAfter) != june-now || int64(v.ResetAfter) != june-now {
			t.Errorf("%s: a take of 4 more: got %+v, want a denial, remaining 3, until the end of the window that was in force, %d", test.name, v, june-now)
		}
		if v := c.take(to, 1, now); !v.Allowed || v.Remaining != 2 || int64(v.ResetAfter) != test.end-now {
			t.Errorf("%s: a take of 1 more: got %+v, want remaining 2, reset after %d", test.name, v, test.end-now)
		}
		if v := c.take(to, 10, test.end); !v.Allowed {
			t.Errorf("%s: a take of all when the window is over: got %+v, want it allowed", test.name, v)
		}
	}

	// An offset is an anchor too.
	hour, quarter := mustRule(t, fixed, 10, 0, time.Hour), rule{Algorithm: algorithm.FixedWindowOffset(10, time.Hour, 15*time.Minute)}
	var c cell
	c.take(hour, 7, start)
	for _, now := range []int64{start + 1, start + 20*60*second, start + 60*60*second - 1} {
		if v := c.take(quarter, 0, now); v.Remaining != 3 || int64(v.ResetAfter) != start+60*60*second-now {
			t.Errorf("offset of 15 minutes, %d µs after the hour: got %+v, want remaining 3 until the next hour", now-start, v)
		}
	}
	if v := c.take(quarter, 10, start+60*60*second); !v.Allowed || int64(v.ResetAfter) != 15*60*second {
		t.Errorf("offset of 15 minutes, at the next hour: got %+v, want it allowed, reset after 15 minutes", v)
	}
}

// Spec.Params tell periods apart, and nothing else does.
func TestCalendarSpecs(t *testing.T) {
	rng := random(t)
	names, texts := oddZones, map[quota.Spec]string{}
	for range size(2000) {
		zone := names[rng.IntN(len(names))]
		p := []algorithm.Period{
			algorithm.Daily(), algorithm.Weekly(time.Weekday(rng.IntN(7))), algorithm.Monthly(1 + rng.IntN(31)), algorithm.Yearly(time.Month(1+rng.IntN(12)), 1+rng.IntN(31)),
		}[rng.IntN(4)].In(zone).At(rng.IntN(24))
		a, again := algorithm.Calendar(1+rng.Int64N(2), p), algorithm.Calendar(1, p)
		checkText(t, a)
		if share := quota.Must(share0(a, 2)); share.Spec().Capacity != a.Spec().Capacity/2 || share.Spec().Params[1] != again.Spec().Params[1] {
			t.Fatalf("half of %v: got %+v, want half of the limit, and the period", a, share.Spec())
		}
		text := fmt.Sprint(a)
		if old := texts[a.Spec()]; old != "" && old != text {
			t.Fatalf("%+v: got it of %s and of %s, want one", a.Spec(), old, text)
		}
		texts[a.Spec()] = text
		if got, want := quota.NewLimit("n", algorithm.Calendar(1, p)).Err(), error(nil); !errors.Is(got, want) {
			t.Fatalf("%v: got %v, want nil", p, got)
		}
	}
}

func share0(a quota.Algorithm, n int64) (quota.Algorithm, error) { return a.(driver.Sharer).Share(n) }

// A decision allocates nothing, also where the clock is near the end of a window.
func TestCalendarDoesNotAllocate(t *testing.T) {
	if testenv.Race {
		t.Skip("the race detector allocates")
	}
	a := algorithm.Calendar(1000, algorithm.Monthly(15).In("Europe/Berlin"))
	var s quota.State
	now, i := quota.Micros(base), 0
	got := testing.AllocsPerRun(5000, func() {
		i++
		now += 300
		if next, v := a.Decide(s, quota.Request{Op: quota.Op(i % 4), Cost: int64(i % 5), Arg: now}, now); v.Write {
			s = next
		}
	})
	if got != 0 {
		t.Errorf("allocations of a decision: got %v, want 0", got)
	}
}

// A zone has one table in a process.
func TestCalendarOneTable(t *testing.T) {
	const n = 8
	var wg sync.WaitGroup
	ends := make([]int64, n)
	for i := range n {
		wg.Go(func() { _, ends[i] = windowAt(algorithm.Calendar(1, algorithm.Daily().In("Indian/Mahe")), base) })
	}
	wg.Wait()
	if slices.Min(ends) != slices.Max(ends) {
		t.Errorf("ends of the day: got %v, want one", ends)
	}
}
