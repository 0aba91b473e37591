package quotalog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/observe/quotalog"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

var bg = context.Background()

// logged is a log as JSON.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// lines returns the lines since the last call, as maps.
func (l *logged) lines(t *testing.T) (lines []map[string]any) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for text := range strings.Lines(l.b.String()) {
		var line map[string]any
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, line)
	}
	l.b.Reset()
	return lines
}

// newLog returns an observer that logs to the result, from Debug on unless the level is another.
func newLog(t *testing.T, o quotalog.Options, level slog.Level) (*quotalog.Observer, *logged) {
	t.Helper()
	text := &logged{}
	o.Logger = slog.New(slog.NewJSONHandler(text, &slog.HandlerOptions{Level: level}))
	l, err := quotalog.New(&o)
	if err != nil {
		t.Fatal(err)
	}
	return l, text
}

func limiterOn(t *testing.T, store quota.Store, l *quotalog.Observer) *quota.Limiter {
	t.Helper()
	limiter := quota.Must(quota.NewLimiter(store, testkit.Bucket("n", 5, time.Hour), &quota.Options{Observers: []func(context.Context, *quota.Call){l.Observe}}))
	t.Cleanup(func() { limiter.Close() })
	return limiter
}

// Denials and errors are logged with their attributes, and grants and peeks are not.
func TestLines(t *testing.T) {
	l, text := newLog(t, quotalog.Options{Secret: []byte("s")}, slog.LevelDebug)
	store := quotatest.New(t, nil)
	limiter := limiterOn(t, store, l)
	m := testkit.Bucket("m", 9, time.Hour)
	canceled, cancel := context.WithCancel(bg)
	cancel()
	hash := l.Hash("team-7/agent-1")
	for _, test := range []struct {
		name string
		call func()
		want map[string]any // nil for no line
	}{
		{"grant", func() { limiter.Take(bg, "team-7/agent-1", 5) }, nil},
		{"denial", func() { limiter.Take(bg, "team-7/agent-1", 1) },
			map[string]any{"level": "INFO", "msg": "quota denied", "limit": "n", "key": hash, "op": "take", "cost": 1., "remaining": 0., "capacity": 5., "retry_after": 12 * 6e10, "source": "store"}},
		{"never", func() { limiter.Take(bg, "team-7/agent-1", 6) },
			map[string]any{"level": "INFO", "msg": "quota denied", "limit": "n", "key": hash, "op": "take", "cost": 6., "remaining": 0., "capacity": 5., "retry_after": "never", "source": "store"}},
		{"peek", func() { limiter.Peek(bg, "team-7/agent-1", 6) }, nil},
		{"list", func() {
			limiter.ChargeAll(bg, quota.Charge{Key: "k", Cost: 1}, quota.Charge{Limit: m, Key: "team-7/agent-1", Cost: 10})
		}, map[string]any{"level": "INFO", "msg": "quota denied", "limit": "m", "key": hash, "op": "take", "charges": 2., "cost": 10., "remaining": 9., "capacity": 9., "retry_after": "never", "source": "store"}},
		{"outage", func() { store.FailNext(1, quota.ErrUnavailable); limiter.Debit(bg, "team-7/agent-1", 1) },
			map[string]any{"level": "WARN", "msg": "quota failed", "limit": "n", "key": hash, "op": "debit", "class": "unavailable", "err": quota.ErrUnavailable.Error()}},
		{"misconfigured", func() {
			store.FailNext(1, fmt.Errorf("%w: %w", quota.ErrIndeterminate, quota.ErrMisconfigured))
			limiter.Take(bg, "team-7/agent-1", 1)
		}, map[string]any{"level": "ERROR", "msg": "quota failed", "limit": "n", "key": hash, "op": "take", "class": "indeterminate", "err": quota.ErrIndeterminate.Error() + ": " + quota.ErrMisconfigured.Error()}},
		{"caller left", func() { limiter.Take(canceled, "team-7/agent-1", 1) },
			map[string]any{"level": "DEBUG", "msg": "quota failed", "limit": "n", "key": hash, "op": "take", "class": "canceled", "err": "context canceled"}},
		{"no list", func() { limiter.ChargeAll(bg) },
			map[string]any{"level": "WARN", "msg": "quota failed", "key": l.Hash(""), "op": "take", "charges": 0., "class": "invalid", "err": "quota: invalid request: number of charges is 0; accepted: 1 to 64"}},
	} {
		test.call()
		got := text.lines(t)
		if len(got) == 1 {
			delete(got[0], "time")
		}
		if test.want == nil && len(got) == 0 {
			continue
		}
		if len(got) != 1 || fmt.Sprint(got[0]) != fmt.Sprint(test.want) {
			t.Errorf("%s: got %v, want %v", test.name, got, test.want)
		}
	}
}

// In a minute each limit and kind has its number of lines, and the next line says how many were left out.
func TestSample(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, text := newLog(t, quotalog.Options{PerMinute: 2}, slog.LevelInfo)
		limiter := limiterOn(t, local.New(), l)
		other := quota.Must(limiter.For(testkit.Bucket("other", 5, time.Hour)))
		for minute, calls := range []int{100, 1, 3} {
			for range calls {
				limiter.Take(bg, "k", 6)
				limiter.Take(bg, "k", -1)
				limiter.Take(bg, "", 1) // the same class
				other.Take(bg, "k", 6)
			}
			lines := text.lines(t)
			got := map[string][]any{}
			for _, line := range lines {
				kind := fmt.Sprint(line["limit"], " ", line["class"])
				got[kind] = append(got[kind], line["suppressed"])
			}
			want := []string{
				"map[n <nil>:[<nil> <nil>] n invalid:[<nil> <nil>] other <nil>:[<nil> <nil>]]",
				"map[n <nil>:[98] n invalid:[198 <nil>] other <nil>:[98]]",
				"map[n <nil>:[<nil> <nil>] n invalid:[<nil> <nil>] other <nil>:[<nil> <nil>]]",
			}[minute]
			if fmt.Sprint(got) != want {
				t.Errorf("minute %d: got %v, want %s", minute, got, want)
			}
			time.Sleep(time.Minute)
		}
	})
}

// Lines that the level leaves out are not counted, and limits beyond the bound share a sample.
func TestBounds(t *testing.T) {
	l, text := newLog(t, quotalog.Options{PerMinute: 1}, slog.LevelWarn)
	limiter := limiterOn(t, local.New(), l)
	limiter.Take(bg, "k", 6)
	if got := text.lines(t); len(got) != 0 {
		t.Errorf("a denial below the level: got %v, want no line", got)
	}
	l, text = newLog(t, quotalog.Options{PerMinute: 1}, slog.LevelInfo)
	for i := range quotalog.MaxLimits + 50 {
		limit := testkit.Bucket(fmt.Sprint("limit-", i), 5, time.Hour)
		l.Observe(bg, &quota.Call{Charges: []quota.Charge{{Limit: limit, Key: "k"}}, Decisions: []quota.Decision{{}}})
	}
	if got := len(text.lines(t)); got != quotalog.MaxLimits+1 {
		t.Errorf("lines of many limits: got %d, want %d and one for the others", got, quotalog.MaxLimits)
	}
}

// No line has a key, whatever the key is, unless keys are asked for.
func TestKeysAreHidden(t *testing.T) {
	long := strings.Repeat("secret-", 20)
	for _, key := range []string{"team-7/agent-1", long, "a", "bob", "with \"quotes\" and \n", "ctl\x00", string([]byte{0xff, 0xfe}) + "secret", long + "/\x01", strings.Repeat("x", quota.MaxKey+1)} {
		for _, show := range []bool{false, true} {
			l, text := newLog(t, quotalog.Options{ShowKeys: show}, slog.LevelDebug)
			store := quotatest.New(t, nil)
			limiter := limiterOn(t, store, l)
			limiter.Take(bg, key, 6)
			limiter.ChargeAll(bg, quota.Charge{Key: key, Cost: 1}, quota.Charge{Key: key, Cost: 1})
			store.FailNext(1, fmt.Errorf("%w: the row %q", quota.ErrUnavailable, key))
			limiter.Take(bg, key, 1)
			if len(key) > 3 {
				store.FailNext(1, fmt.Errorf("%w: the row %s", quota.ErrUnavailable, key))
				limiter.Take(bg, key, 1)
			}
			for _, line := range text.lines(t) {
				shown := line["key"] != l.Hash(key)
				for name, value := range line {
					s, ok := value.(string)
					shown = shown || ok && name != "time" && (len(key) > 3 && strings.Contains(s, key) || strings.Contains(s, fmt.Sprintf("%q", key)) ||
						len(key) > 64 && strings.Contains(s, fmt.Sprintf("%q", key[:64]+"…")))
				}
				if shown != show {
					t.Errorf("key %.30q, shown %v: got %v", key, show, line)
				}
			}
		}
	}
}

// Hashes of one secret are equal, and those of others differ.
func TestHash(t *testing.T) {
	of := func(secret []byte) string {
		return quota.Must(quotalog.New(&quotalog.Options{Secret: secret})).Hash("k")
	}
	if a, b := of([]byte("s")), of([]byte("s")); a != b || len(a) != 16 {
		t.Errorf("one secret: got %q and %q, want 16 equal digits", a, b)
	}
	if a, b, c := of(nil), of(nil), of([]byte{}); a == b || a == c {
		t.Errorf("other secrets: got %q, %q and %q, want different ones", a, b, c)
	}
}

func TestOptions(t *testing.T) {
	_, err := quotalog.New(&quotalog.Options{PerMinute: -1})
	testkit.WantInvalid(t, err, "Options.PerMinute is -1", "accepted: ")
}

// A notice is a warning with its name.
func TestNotices(t *testing.T) {
	text := &logged{}
	tell := quotalog.Notices(slog.New(slog.NewJSONHandler(text, nil)))
	tell(quota.Notice{Name: "breaker", Text: "it opened", Err: errors.New("why")})
	tell(quota.Notice{Name: "version", Text: "too old"})
	got := text.lines(t)
	for i, want := range []string{"map[err:why level:WARN msg:fleetquota: it opened notice:breaker]", "map[level:WARN msg:fleetquota: too old notice:version]"} {
		delete(got[i], "time")
		if fmt.Sprint(got[i]) != want {
			t.Errorf("notice: got %v, want %s", got[i], want)
		}
	}
}

// Many callers at once get no more than the lines of the minute.
func TestConcurrent(t *testing.T) {
	l, text := newLog(t, quotalog.Options{PerMinute: 5}, slog.LevelInfo)
	limiter := limiterOn(t, local.New(), l)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				limiter.Take(bg, "k", 6)
			}
		})
	}
	wg.Wait()
	if got := len(text.lines(t)); got < 5 || got > 10 { // a minute may end meanwhile
		t.Errorf("lines: got %d, want 5", got)
	}
}
