package clienttest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// none fails the test if a call was granted.
func (y *tally) none(t testing.TB, when string) {
	t.Helper()
	if y.ok > 0 {
		t.Errorf("%s: got %v, want no grant", when, y)
	}
}

// tally counts the outcomes of calls, by class.
type tally struct {
	mu       sync.Mutex
	ok       int64 // granted
	denied   int64
	failed   map[error]int64
	texts    map[string]int64
	lastOK   time.Time
	gap      time.Duration // the longest time from one grant to the next
	slowest  time.Duration
	examples []error
}

func (y *tally) add(d quota.Decision, err error, took time.Duration) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.slowest = max(y.slowest, took)
	switch {
	case err != nil:
		if y.failed == nil {
			y.failed, y.texts = map[error]int64{}, map[string]int64{}
		}
		c := class(err)
		if c == err {
			y.examples = append(y.examples, err)
			c = errOdd
		}
		y.failed[c]++
		if len(y.texts) < 20 {
			y.texts[err.Error()]++
		}
	case d.Allowed:
		y.ok++
		now := time.Now()
		if !y.lastOK.IsZero() {
			y.gap = max(y.gap, now.Sub(y.lastOK))
		}
		y.lastOK = now
	default:
		y.denied++
	}
}

var errOdd = errors.New("error of no class")

func (y *tally) granted() int64 {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.ok
}

func (y *tally) errors() (n int64) {
	for _, m := range y.failed {
		n += m
	}
	return n
}

// failure returns an error if a call failed.
func (y *tally) failure() error {
	if n := y.errors(); n > 0 {
		return fmt.Errorf("got %d errors, want none: %v, such as %v", n, y, y.texts)
	}
	return nil
}

func (y *tally) String() string {
	s := fmt.Sprintf("%d granted, %d denied", y.ok, y.denied)
	for c, n := range y.failed {
		s += fmt.Sprintf(", %d %v", n, c)
	}
	return s + fmt.Sprintf("; longest without a grant %v, slowest call %v", y.gap.Round(time.Millisecond), y.slowest.Round(time.Millisecond))
}

// only fails the test if there was an error of another class.
func (y *tally) only(t testing.TB, classes ...error) {
	t.Helper()
	for c, n := range y.failed {
		if !slices.Contains(classes, c) {
			t.Errorf("errors: got %d of %q, want none but %v", n, c, classes)
			for text, n := range y.texts {
				t.Logf("%d times: %s", n, text)
			}
			for _, e := range y.examples[:min(len(y.examples), 3)] {
				t.Logf("%T: %v", e, e)
			}
			return
		}
	}
}

// bounds fails the test unless granted <= charged <= granted + unknown.
func (y *tally) bounds(t testing.TB, charged int64) {
	t.Helper()
	if most := y.ok + y.failed[quota.ErrIndeterminate]; charged < y.ok || charged > most {
		t.Errorf("tokens charged: got %d, want %d, which were granted, to %d, with those whose outcome is unknown", charged, y.ok, most)
	}
}

// exact fails the test unless granted == charged.
func (y *tally) exact(t testing.TB, charged int64) {
	t.Helper()
	if charged != y.ok {
		t.Errorf("tokens charged: got %d, want the %d that were granted", charged, y.ok)
	}
}

// do makes one call and counts it.
func (y *tally) do(ctx context.Context, s quota.Store, c quota.Charge) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := time.Now()
	d, err := s.Charge(ctx, c)
	y.add(d, err, time.Since(start))
	return err
}

// calls makes n calls of one token each, spread over the keys, from some goroutines.
func calls(s quota.Store, l *quota.Limit, keys []string, n int) *tally {
	y := &tally{}
	const workers = 16
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				y.do(bg, s, quota.Charge{Limit: l, Key: keys[i%len(keys)], Cost: 1})
			}
		})
	}
	wg.Wait()
	return y
}

// load makes calls of one token each, spread over the keys, until stop, which returns the outcomes. Its
// pauses keep it from taking all of a machine that other tests need too.
func load(t testing.TB, s quota.Store, l *quota.Limit, keys []string) (y *tally, stop func() *tally) {
	y = &tally{}
	done := make(chan struct{})
	const workers = 8
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; ; i += workers {
				select {
				case <-done:
					return
				default:
				}
				y.do(bg, s, quota.Charge{Limit: l, Key: keys[i%len(keys)], Cost: 1})
				time.Sleep(spared(2*time.Millisecond, 5*time.Millisecond))
			}
		})
	}
	stop = sync.OnceValue(func() *tally {
		close(done)
		wg.Wait()
		return y
	})
	t.Cleanup(func() { stop() })
	return y, stop
}

// more waits until n more calls were granted.
func (y *tally) more(t testing.TB, n int64) {
	t.Helper()
	before := y.granted()
	until(t, "calls to be granted", func() bool { return y.granted() >= before+n })
}
