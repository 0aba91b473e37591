package top_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/observe/top"
	"github.com/fleetquota/fleetquota/quota"
)

var (
	bg    = context.Background()
	limit = testkit.Bucket("tokens", 1<<40, time.Hour)
)

func newObserver(t *testing.T, o *top.Options) *top.Observer {
	t.Helper()
	observer, err := top.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return observer
}

// use tells an observer of a call that used tokens, or of one that was denied.
func use(o *top.Observer, key string, n int64) {
	tell(o, quota.Decision{Allowed: true, Charged: n}, key, n)
}
func deny(o *top.Observer, key string, n int64) { tell(o, quota.Decision{}, key, n) }

func tell(o *top.Observer, d quota.Decision, key string, n int64) {
	o.Observe(bg, &quota.Call{Charges: []quota.Charge{{Limit: limit, Key: key, Cost: n}}, Decisions: []quota.Decision{d}, Granted: d.Allowed})
}

// ranking returns a ranking of the limit "tokens".
func ranking(t *testing.T, r top.Report, denied bool) top.Ranking {
	t.Helper()
	for _, l := range r.Limits {
		if l.Limit == limit.Name() {
			if denied {
				return l.Denied
			}
			return l.Used
		}
	}
	t.Fatalf("limits: got %v, want tokens among them", r.Limits)
	return top.Ranking{}
}

// checkBounds compares a ranking with the exact weights: each is within its row's bound, no error is above the promised one,
// and a key without a row weighs at most Absent.
func checkBounds(t *testing.T, name string, r top.Ranking, exact map[string]int64, keys int64) {
	t.Helper()
	total := int64(0)
	for _, n := range exact {
		total += n
	}
	if r.Total != total {
		t.Errorf("%s: total: got %d, want %d", name, r.Total, total)
	}
	rows := map[string]bool{}
	for i, row := range r.Rows {
		rows[row.Key] = true
		if want := exact[row.Key]; want > row.Weight || want < row.Weight-row.Error {
			t.Errorf("%s: row %d, %q: got a weight of %d to %d, want %d in it", name, i, row.Key, row.Weight-row.Error, row.Weight, want)
		}
		if row.Error > total/keys {
			t.Errorf("%s: row %d: got an error of %d, want at most %d, one part in %d of %d", name, i, row.Error, total/keys, keys, total)
		}
		if i > 0 && row.Weight > r.Rows[i-1].Weight {
			t.Errorf("%s: row %d: got a weight of %d below one of %d", name, i, row.Weight, r.Rows[i-1].Weight)
		}
	}
	for key, n := range exact {
		if !rows[key] && n > r.Absent {
			t.Errorf("%s: key %q weighs %d: got no row, and at most %d for keys without one", name, key, n, r.Absent)
		}
	}
	if r.Absent > total/keys {
		t.Errorf("%s: absent: got %d, want at most %d", name, r.Absent, total/keys)
	}
}

// streams are orders of keys and weights that make a ranking err as far as it can.
func streams(random *rand.Rand, n int) map[string]func(tell func(key string, weight int64)) {
	zipf := rand.NewZipf(random, 1.1, 1, 1<<20)
	return map[string]func(tell func(string, int64)){
		"zipf": func(tell func(string, int64)) {
			for range n {
				tell(fmt.Sprint("key-", zipf.Uint64()), 1+random.Int64N(100))
			}
		},
		"all keys differ": func(tell func(string, int64)) {
			for i := range n {
				tell(fmt.Sprint("key-", i), 1)
			}
		},
		"few keys in turn, always one more than there are rows": func(tell func(string, int64)) {
			for i := range n {
				tell(fmt.Sprint("key-", i%81), 3)
			}
		},
		"heavy keys first, then a flood": func(tell func(string, int64)) {
			for i := range n {
				if i < n/10 {
					tell(fmt.Sprint("heavy-", i%5), 10)
				} else {
					tell(fmt.Sprint("key-", i), 1)
				}
			}
		},
		"a flood, then heavy keys": func(tell func(string, int64)) {
			for i := range n {
				if i > n*9/10 {
					tell(fmt.Sprint("heavy-", i%5), 10)
				} else {
					tell(fmt.Sprint("key-", i), 1)
				}
			}
		},
		"each heavier than the one before": func(tell func(string, int64)) {
			for i := range n {
				tell(fmt.Sprint("key-", i), int64(i+1))
			}
		},
		"keys come back after others took their rows": func(tell func(string, int64)) {
			for i := range n {
				tell(fmt.Sprint("key-", i%1000), 1+int64(i%7))
			}
		},
	}
}

// Each ranking is within its bound of the exact weights, on streams of any order.
func TestBounds(t *testing.T) {
	const keys = 10
	random := testenv.Random(t)
	for name, stream := range streams(random, testenv.Sized(20_000, 1_000_000)) {
		for _, denied := range []bool{false, true} {
			o := newObserver(t, &top.Options{Keys: keys})
			exact := map[string]int64{}
			stream(func(key string, n int64) {
				exact[key] += n
				if denied {
					deny(o, key, n)
				} else {
					use(o, key, n)
				}
			})
			checkBounds(t, name, ranking(t, o.Report(), denied), exact, keys)
		}
	}
}

// Reports of several processes, some of which are shortened and sent as JSON, add up within the sum's bound.
func TestMerge(t *testing.T) {
	const keys = 10
	random := testenv.Random(t)
	for name, stream := range streams(random, 20_000) {
		for _, rows := range []int{math.MaxInt, 5} {
			var processes [3]*top.Observer
			for i := range processes {
				processes[i] = newObserver(t, &top.Options{Keys: keys})
			}
			exact := map[string]int64{}
			stream(func(key string, n int64) {
				exact[key] += n
				use(processes[random.IntN(len(processes))], key, n)
			})
			var reports []top.Report
			for _, p := range processes {
				b, err := json.Marshal(p.Report().Top(rows))
				if err != nil {
					t.Fatal(err)
				}
				var r top.Report
				if err := json.Unmarshal(b, &r); err != nil {
					t.Fatal(err)
				}
				reports = append(reports, r)
			}
			promised := int64(keys)
			if rows == 5 {
				promised = 5 // a row that was left out is at most the fifth part
			}
			checkBounds(t, name, ranking(t, top.Merge(reports...), false), exact, promised)
		}
	}
	if got := top.Merge(); len(got.Limits) != 0 || got.Limits == nil {
		t.Errorf("no reports: got %+v, want an empty report", got)
	}
}

// Rankings cover one to two windows, and say which.
func TestWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newObserver(t, &top.Options{Window: time.Minute})
		start := time.Now()
		for i, step := range []struct {
			wait  time.Duration
			since time.Duration
			want  map[string]int64
		}{
			{0, 0, map[string]int64{"k0": 1}},
			{59 * time.Second, 0, map[string]int64{"k0": 1, "k1": 2}},
			{time.Second, 0, map[string]int64{"k0": 1, "k1": 2, "k2": 4}},
			{59 * time.Second, 0, map[string]int64{"k0": 1, "k1": 2, "k2": 4, "k3": 8}},
			{time.Second, time.Minute, map[string]int64{"k2": 4, "k3": 8, "k4": 16}},
			{2 * time.Minute, 3 * time.Minute, map[string]int64{"k5": 32}},
			{time.Hour, 63 * time.Minute, map[string]int64{"k6": 64}},
		} {
			time.Sleep(step.wait)
			use(o, fmt.Sprint("k", i), 1<<i)
			r := o.Report()
			if got := r.Since.Sub(start); got != step.since {
				t.Errorf("step %d: since: got %v, want %v", i, got, step.since)
			}
			if got := r.Until; !got.Equal(time.Now()) {
				t.Errorf("step %d: until: got %v, want now", i, got)
			}
			checkBounds(t, fmt.Sprint("step ", i), ranking(t, r, false), step.want, 1)
			if got := len(ranking(t, r, false).Rows); got != len(step.want) {
				t.Errorf("step %d: rows: got %d, want %d", i, got, len(step.want))
			}
		}
		time.Sleep(2 * time.Minute)
		if r := ranking(t, o.Report(), false); r.Total != 0 || len(r.Rows) != 0 {
			t.Errorf("after two windows without calls: got %+v, want none", r)
		}
	})
}

// The keys that are counted, and their weights, are those that the package states.
func TestCounted(t *testing.T) {
	five := testkit.Bucket("five", 5, time.Hour)
	taken := quota.Charge{Limit: five, Key: "taken", Cost: 3}
	observer := newObserver(t, nil)
	ch := quota.Must(quota.NewCharger(local.New(), &quota.Options{Observers: []func(context.Context, *quota.Call){observer.Observe}}))
	defer ch.Close()
	list := func(cs ...quota.Charge) quota.Result {
		t.Helper()
		r, err := ch.ChargeAll(bg, cs...)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	of := func(key string, cost int64) quota.Charge { return quota.Charge{Limit: five, Key: key, Cost: cost} }
	op := func(c quota.Charge, op quota.Op) quota.Charge { c.Op = op; return c }
	shadow := func(c quota.Charge) quota.Charge { c.Shadow = true; return c }

	d := list(taken).Decisions[0] // used 3
	list(taken.Settle(d, 1))      // back 2
	for range 2 {
		list(quota.Charge{Limit: five, Key: "again", Cost: 3, ID: "id"}) // used 3, once
		list(taken.Settle(d, 1))                                         // and no more back
	}
	list(of("never", 1<<50))                                   // denied 5: the capacity
	list(op(of("debt", 5), quota.OpDebit))                     // used 5
	list(of("debt", 1), of("fits", 1))                         // denied: debt 1, and fits none
	list(of("debt", 2), of("never", 9))                        // denied: both
	list(op(of("debt", 1), quota.OpPeek))                      // not counted
	list(shadow(of("debt", 1)), of("beside", 2))               // used: beside 2
	list(shadow(of("tried", 2)))                               // used: tried 2
	list(op(of("over", 6), quota.OpDebit))                     // used 5 or 6, by the debt that the bucket allows
	list(of("over", 0))                                        // denied 1 or not, by that
	if _, err := ch.ChargeAll(bg, of("bad", -1)); err == nil { // an error
		t.Fatal("got no error of a cost of -1")
	}
	if _, err := ch.TakeFirst(bg, []quota.Charge{of("debt", 3), of("never", 6)}, []quota.Charge{of("never", 7)}); err != nil {
		t.Fatal(err) // denied: one of the lists
	}
	closed := quota.Call{Charges: []quota.Charge{of("closed", 1)}, Decisions: []quota.Decision{{Source: quota.FromClosed}}}
	observer.Observe(bg, &closed)
	observer.Observe(bg, &quota.Call{Charges: []quota.Charge{op(of("renewed", 0), quota.OpRenew)}, Decisions: []quota.Decision{{}}})

	over := list(op(of("over", 1), quota.OpPeek)).Decisions[0]
	r := observer.Report()
	if len(r.Limits) != 1 || r.Limits[0].Limit != "five" {
		t.Fatalf("limits: got %+v, want five", r.Limits)
	}
	used := map[string]int64{"taken": 3, "again": 3, "debt": 5, "beside": 2, "tried": 2, "over": 5 - over.Remaining}
	denied := map[string]int64{"never": 5 + 5, "debt": 1 + 2}
	if over.Remaining < 0 {
		denied["over"] = 1
	}
	for name, test := range map[string]struct {
		got  top.Ranking
		want map[string]int64
	}{"used": {r.Limits[0].Used, used}, "denied": {r.Limits[0].Denied, denied}} {
		got := map[string]int64{}
		for _, row := range test.got.Rows {
			if row.Error != 0 {
				t.Errorf("%s: %+v: got an error, want none of few keys", name, row)
			}
			if want := map[bool]int64{true: 2}[name == "used" && row.Key == "taken"]; row.Back != want {
				t.Errorf("%s: %s: given back: got %d, want %d", name, row.Key, row.Back, want)
			}
			got[row.Key] = row.Weight
		}
		if name == "denied" { // of the alternatives: the first or the second list
			if got["never"] == denied["never"]+5 {
				got["never"] -= 5
				if got["debt"] == denied["debt"]+3 {
					got["debt"] -= 3
				}
			} else {
				t.Errorf("denied alternatives: got %v, want one list of them", got)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(test.want) {
			t.Errorf("%s: got %v, want %v", name, got, test.want)
		}
	}
}

// Weights that add up to more than a number holds stay the largest number.
func TestSaturates(t *testing.T) {
	o := newObserver(t, nil)
	for range 3 {
		use(o, "k", math.MaxInt64/2)
	}
	if r := ranking(t, top.Merge(o.Report(), o.Report()), false); r.Total != math.MaxInt64 || r.Rows[0].Weight != math.MaxInt64 {
		t.Errorf("got %+v, want the largest number", r)
	}
}

// Key replaces the keys, and a million of them take bounded memory. Limits beyond the bound are counted apart.
func TestKeys(t *testing.T) {
	groups := newObserver(t, &top.Options{Key: quota.Group})
	use(groups, "team-7/a", 1)
	use(groups, "team-7/b", 2)
	if r := ranking(t, groups.Report(), false); len(r.Rows) != 1 || r.Rows[0] != (top.Row{Key: "team-7", Weight: 3}) {
		t.Errorf("groups: got %+v, want team-7 with 3", r.Rows)
	}

	o := newObserver(t, nil)
	long := strings.Repeat("x", quota.MaxKey-10)
	before := heap()
	for i := range testenv.Sized(100_000, 1_000_000) {
		deny(o, fmt.Sprintf("%s%010d", long, i), 1)
	}
	const rows = 16 * top.DefaultKeys // of one ranking, two windows
	if got := len(ranking(t, o.Report(), true).Rows); got > rows {
		t.Errorf("rows: got %d, want at most %d", got, rows)
	}
	if got, most := int64(heap()-before), int64(rows*(quota.MaxKey+150)); !testenv.Race && got > most {
		t.Errorf("memory: got %d bytes, want at most %d", got, most)
	}
	for i := range top.MaxLimits + 5 {
		o.Observe(bg, &quota.Call{Charges: []quota.Charge{{Limit: testkit.Bucket(fmt.Sprint("limit-", i), 5, time.Hour), Key: "k"}}, Decisions: []quota.Decision{{Charged: 1, Allowed: true}}, Granted: true})
	}
	if r := o.Report(); len(r.Limits) != top.MaxLimits || r.Uncounted != 6 {
		t.Errorf("limits: got %d, and %d charges beyond, want %d and 6", len(r.Limits), r.Uncounted, top.MaxLimits)
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// Callers and readers at once lose no token.
func TestConcurrent(t *testing.T) {
	o := newObserver(t, &top.Options{Keys: 5})
	var wg sync.WaitGroup
	const goroutines, calls = 8, 2000
	for g := range goroutines {
		wg.Go(func() {
			for i := range calls {
				use(o, fmt.Sprint("key-", i%50), 2)
				if i%500 == g {
					o.Report()
				}
			}
		})
	}
	wg.Wait()
	exact := map[string]int64{}
	for i := range 50 {
		exact[fmt.Sprint("key-", i)] = goroutines * calls / 50 * 2
	}
	checkBounds(t, "concurrent", ranking(t, o.Report(), false), exact, 5)
}

// A call allocates nothing for a key that has a row, and once for another.
func TestAllocs(t *testing.T) {
	if testenv.Race {
		t.Skip("the race detector allocates")
	}
	o := newObserver(t, nil)
	call := &quota.Call{Charges: []quota.Charge{{Limit: limit, Key: "k", Cost: 1}}, Decisions: []quota.Decision{{Allowed: true, Charged: 1}}, Granted: true}
	if got := testing.AllocsPerRun(1000, func() { o.Observe(bg, call) }); got != 0 {
		t.Errorf("allocations of a known key: got %v, want 0", got)
	}
	keys := make([]string, 20_000)
	for i := range keys {
		keys[i] = fmt.Sprint("key-", i)
	}
	i := 0
	for ; i < 10_000; i++ {
		use(o, keys[i], 1)
	}
	if got := testing.AllocsPerRun(5000, func() { call.Charges[0].Key = keys[i]; i++; o.Observe(bg, call) }); got > 1 {
		t.Errorf("allocations of a new key: got %v, want at most 1", got)
	}
}

func BenchmarkObserve(b *testing.B) {
	for _, keys := range []int{1, 1 << 16} {
		b.Run(fmt.Sprint(keys, "keys"), func(b *testing.B) {
			o := quota.Must(top.New(nil))
			names := make([]string, keys)
			for i := range names {
				names[i] = fmt.Sprint("team-7/agent-", i)
			}
			call := &quota.Call{Charges: []quota.Charge{{Limit: limit, Cost: 1}}, Decisions: []quota.Decision{{Allowed: true, Charged: 1}}, Granted: true}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				call.Charges[0].Key = names[i%keys]
				o.Observe(bg, call)
			}
		})
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []top.Options{{Keys: -1}, {Keys: top.MaxKeys + 1}, {Window: -1}} {
		_, err := top.New(&o)
		testkit.WantInvalid(t, err, "Options.", "accepted: ")
	}
}

// get returns the answer to a request.
func get(t *testing.T, h http.Handler, method, target, accept string) (*http.Response, string) {
	t.Helper()
	r := httptest.NewRequest(method, target, nil)
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	body, err := io.ReadAll(w.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	return w.Result(), string(body)
}

// The handler answers with a page or JSON, with as many rows as it is asked for.
func TestHandler(t *testing.T) {
	o := newObserver(t, nil)
	if _, body := get(t, o, "GET", "/", ""); !strings.Contains(body, "No limit was charged.") {
		t.Errorf("without calls: got %s", body)
	}
	for i := range 60 {
		use(o, fmt.Sprint("key-", i), int64(i+1))
	}
	for _, test := range []struct {
		method, target, accept string
		status, rows           int
		kind                   string
	}{
		{"GET", "/top", "text/html,*/*", 200, top.DefaultRows, "text/html; charset=utf-8"},
		{"GET", "/top?n=7", "", 200, 7, "text/html; charset=utf-8"},
		{"GET", "/top", "application/json", 200, 60, "application/json"},
		{"GET", "/top?format=json&n=7", "text/html", 200, 7, "application/json"},
		{"GET", "/top?format=html", "application/json", 200, top.DefaultRows, "text/html; charset=utf-8"},
		{"HEAD", "/top", "", 200, top.DefaultRows, "text/html; charset=utf-8"},
		{"GET", "/top?n=-1", "", 400, 0, "text/plain; charset=utf-8"},
		{"GET", "/top?n=%3Cscript%3E", "", 400, 0, "text/plain; charset=utf-8"},
		{"POST", "/top", "", 405, 0, "text/plain; charset=utf-8"},
	} {
		name := test.method + " " + test.target + " " + test.accept
		resp, body := get(t, o, test.method, test.target, test.accept)
		if resp.StatusCode != test.status || resp.Header.Get("Content-Type") != test.kind || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: got %d, %v, want %d and %s", name, resp.StatusCode, resp.Header, test.status, test.kind)
		}
		rows := strings.Count(body, "<tr><td")
		if test.kind == "application/json" {
			var r top.Report
			if err := json.Unmarshal([]byte(body), &r); err != nil {
				t.Fatal(err)
			}
			used := ranking(t, r, false)
			if rows = len(used.Rows); used.Total != 60*61/2 || rows == 7 && used.Absent != 53 {
				t.Errorf("%s: got %+v, want a total of 1830, and 53 for keys without a row", name, used)
			}
		}
		if rows != test.rows {
			t.Errorf("%s: rows: got %d, want %d", name, rows, test.rows)
		}
		if strings.Contains(body, "<script") {
			t.Errorf("%s: got %s", name, body)
		}
	}
	failing := top.Handler(func(context.Context) (top.Report, error) { return top.Report{}, io.ErrUnexpectedEOF })
	if resp, body := get(t, failing, "GET", "/", ""); resp.StatusCode != 502 || !strings.Contains(body, "unexpected EOF") {
		t.Errorf("a report that fails: got %d, %q, want 502 and its error", resp.StatusCode, body)
	}
}

// Keys that strangers chose are text in the page, and no tag, attribute, script or character that turns the line around.
func TestHostileKeys(t *testing.T) {
	o := newObserver(t, nil)
	for _, key := range []string{"<script>alert(1)</script>", `"><img src=x onerror=alert(1)>`, "{{.Limits}}", "a\u202etxt.exe", "</bdi></td>", "a\nb", "javascript:alert(1)"} {
		deny(o, key, 1)
	}
	resp, body := get(t, o, "GET", "/", "")
	for _, bad := range []string{"<script", "<img", "\u202e", "</bdi></td></bdi>", "a\nb"} {
		if strings.Contains(body, bad) {
			t.Errorf("got %q in the page\n%s", bad, body)
		}
	}
	for _, want := range []string{"<bdi>&lt;script&gt;alert(1)&lt;/script&gt;</bdi>", `<bdi>&#34;a\u202etxt.exe&#34;</bdi>`, "<bdi>{{.Limits}}</bdi>"} {
		if !strings.Contains(body, want) {
			t.Errorf("got no %q in the page\n%s", want, body)
		}
	}
	if got := resp.Header.Get("Content-Security-Policy"); !strings.Contains(got, "default-src 'none'") || strings.Contains(got, "unsafe") {
		t.Errorf("policy: got %q, want one that allows nothing but the page's style", got)
	}
	_, body = get(t, o, "GET", "/?format=json", "")
	if strings.Contains(body, "<") || !strings.Contains(body, `"key":"\u003cscript\u003e`) {
		t.Errorf("JSON: got %s, want no tag", body)
	}
}
