package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

type opener = func(context.Context) (quota.Store, string, error)

// on returns an opener of one store.
func on(store quota.Store) opener {
	return func(context.Context) (quota.Store, string, error) { return store, "memory", nil }
}

var plain = regexp.MustCompile(`^4 teams of 5 agents on memory, for 1\.2s
 1\.\ds  offered +\d+  admitted +\d+  denied by  agent +\d+  requests +\d+  team +\d+  fleet +\d+
( 1\.\ds  offered .*
)?
 +calls +calls denied by +tokens
 +offered admitted +agent requests +team +fleet +offered admitted  settled
team-1 +\d+ +\d+ +\d+ +\d+ +\d+ +\d+ +\d+ +\d+ +[-+]\d+
team-2 .*
team-3 .*
team-4 .*
fleet +\d+ +\d+ +\d+ +\d+ +\d+ +\d+ +\d+ +\d+ +[-+]\d+

limit +keys +charged +returned +most beyond refill, in any interval
agent +\d+ +\d+ +\d+   \d+ of 180
requests +\d+ +\d+ +0   \d of 6
team +4 +\d+ +\d+   \d+ of 450
fleet +1 +\d+ +\d+   \d+ of 1300

No limit was exceeded: no interval has more than capacity \+ rate × its length\.
$`)

func TestRun(t *testing.T) {
	t.Setenv("REDIS_URL", "")
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), []string{"-for", "1200ms"}, &stdout, &stderr, openStore)
	if code != 0 || stderr.Len() > 0 {
		t.Errorf("exit status %d, stderr %q", code, &stderr)
	}
	if !plain.Match(stdout.Bytes()) {
		t.Errorf("unexpected output:\n%s", &stdout)
	}
}

// TestEveryLimitWorks runs three minutes of simulated time, in which each limit must have denied
// something and been used by half at least: otherwise the check would show little.
func TestEveryLimitWorks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := local.New()
		f := quota.Must(newFleet(store, options{teams: 4, agents: 5}))
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		f.work(ctx)
		total := f.total()
		for _, finding := range check(f.entries) {
			r := finding.rule
			if total.deniedBy[r.name] == 0 {
				t.Errorf("limit %s denied nothing", r.name)
			}
			if finding.excess != "" || finding.peak > r.capacity || finding.peak < r.capacity/2 {
				t.Errorf("limit %s: peak %d of %d, excess %q", r.name, finding.peak, r.capacity, finding.excess)
			}
		}
		if total.settled == 0 || total.failed != 0 || total.calls != total.admitted+sum(total.deniedBy) {
			t.Errorf("%+v", total)
		}
	})
}

func sum(m map[string]int64) (n int64) {
	for _, v := range m {
		n += v
	}
	return n
}

// broken is a store that changes what another one does.
type broken struct {
	quota.Store
	// before changes the charges; after changes the decisions.
	before func(*quota.Charge)
	after  func(*quota.Charge, *quota.Decision)
	twice  bool // sends each list of refunds twice
}

func (b *broken) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	cs = append([]quota.Charge(nil), cs...)
	if b.before != nil {
		for i := range cs {
			b.before(&cs[i])
		}
	}
	if err := b.Store.ChargeAll(ctx, cs, out); err != nil {
		return err
	}
	if b.twice && cs[0].Op == quota.OpRefund {
		return b.Store.ChargeAll(ctx, cs, out)
	}
	if b.after != nil {
		for i := range cs {
			b.after(&cs[i], &out[i])
		}
	}
	return nil
}

// widened returns a before that gives one limit other numbers.
func widened(r *rule, capacity, refill int64, per time.Duration) func(*quota.Charge) {
	limit := quota.NewLimit(r.name, algorithm.TokenBucket(capacity, refill, per))
	return func(c *quota.Charge) {
		if c.Limit.Name() == r.name {
			c.Limit = limit
		}
	}
}

// TestCheckFindsBrokenStores runs the fleet on stores that admit too much: by far, or barely.
func TestCheckFindsBrokenStores(t *testing.T) {
	for name, test := range map[string]struct {
		store broken
		limit string
	}{
		"admits everything": {broken{after: func(c *quota.Charge, d *quota.Decision) { d.Allowed, d.Charged = true, c.Cost }}, "fleet"},
		"forgets a limit": {broken{before: func(c *quota.Charge) {
			if c.Limit == teamTokens.limit {
				c.Op = quota.OpPeek
			}
		}}, "team"},
		"forgets debits": {broken{before: func(c *quota.Charge) {
			if c.Op == quota.OpDebit {
				c.Op = quota.OpPeek
			}
		}}, "fleet"},
		"refunds twice":        {broken{twice: true}, "fleet"},
		"one token too many":   {broken{before: widened(fleetTokens, fleetTokens.capacity+1, fleetTokens.refill, time.Second)}, "fleet"},
		"one request too many": {broken{before: widened(agentRequests, agentRequests.capacity+1, agentRequests.refill, time.Second)}, "requests"},
		"refills 1 % faster":   {broken{before: widened(fleetTokens, fleetTokens.capacity, fleetTokens.refill+4, time.Second)}, "fleet"},
		"has a bucket a key":   {broken{before: func(c *quota.Charge) { c.Key += fmt.Sprint("/", c.Cost%2) }}, "fleet"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				test.store.Store = local.New()
				var stdout, stderr bytes.Buffer
				code := run(t.Context(), []string{"-for", "1m"}, &stdout, &stderr, on(&test.store))
				if code != 1 || !strings.Contains(stdout.String(), "EXCEEDED: limit "+test.limit+",") || strings.Contains(stdout.String(), "No limit was exceeded") {
					t.Errorf("exit status %d, %s\n%s", code, &stderr, &stdout)
				}
			})
		})
	}
}

// TestLedgers runs two fleets at a time and checks their ledgers together.
func TestLedgers(t *testing.T) {
	shared := local.New()
	for _, test := range []struct {
		name         string
		one, another quota.Store
		runs         [2]string
		code         int
	}{
		{"one store", shared, shared, [2]string{"a-", "a-"}, 0},
		{"one store, different runs", shared, shared, [2]string{"b-", "c-"}, 0},
		{"a store each", local.New(), local.New(), [2]string{"", ""}, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			files := []string{filepath.Join(dir, "1.jsonl"), filepath.Join(dir, "2.jsonl")}
			var both sync.WaitGroup
			for i, store := range []quota.Store{keepOpen{test.one}, keepOpen{test.another}} {
				both.Go(func() {
					var out bytes.Buffer
					if code := run(t.Context(), []string{"-for", "1s", "-run", test.runs[i], "-ledger", files[i]}, &out, &out, on(store)); code != 0 {
						t.Errorf("run %d: exit status %d\n%s", i, code, &out)
					}
				})
			}
			both.Wait()
			var out bytes.Buffer
			if code := run(t.Context(), append([]string{"-check"}, files...), &out, &out, nil); code != test.code {
				t.Errorf("-check: exit status %d, want %d\n%s", code, test.code, &out)
			}
			entries, err := readLedgers(files[:1])
			if err != nil || len(entries) == 0 {
				t.Fatalf("%d entries, %v", len(entries), err)
			}
			key := regexp.MustCompile("^" + test.runs[0] + `(fleet|team-\d(/agent-\d)?)$`)
			for _, e := range entries {
				if !key.MatchString(e.Key) {
					t.Fatalf("a key %q in run %q", e.Key, test.runs[0])
				}
			}
		})
	}
}

type keepOpen struct{ quota.Store }

func (keepOpen) Close() error { return nil }

func TestInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		start := time.Now()
		var out bytes.Buffer
		if code := run(ctx, []string{"-for", "1h"}, &out, &out, on(local.New())); code != 0 || time.Since(start) > 3*time.Second {
			t.Errorf("exit status %d after %v\n%s", code, time.Since(start), &out)
		}
	})
}

// TestStoreErrors runs on a store that can fail any call, and checks that what it charged all the same
// is counted so that the check neither fails nor passes wrongly.
func TestStoreErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &flaky{Store: local.New()}
		var out bytes.Buffer
		if code := run(t.Context(), []string{"-for", "20s"}, &out, &out, on(store)); code != 0 || !strings.Contains(out.String(), "calls failed. The last error:") {
			t.Errorf("exit status %d\n%s", code, &out)
		}
	})
	var out bytes.Buffer
	code := run(t.Context(), []string{"-for", "100ms"}, &out, &out, on(down{}))
	if code != 1 || !strings.Contains(out.String(), "nothing to check") || !strings.Contains(out.String(), "store unavailable") {
		t.Errorf("exit status %d\n%s", code, &out)
	}
	out.Reset()
	t.Setenv("REDIS_URL", "nosuch://user:secret@host")
	if code := run(t.Context(), nil, &out, &out, openStore); code != 1 || !strings.Contains(out.String(), "REDIS_URL") || strings.Contains(out.String(), "secret") {
		t.Errorf("exit status %d\n%s", code, &out)
	}
}

// flaky loses the answer of every fourth call after the call was made.
type flaky struct {
	quota.Store
	mu    sync.Mutex
	calls int
}

func (f *flaky) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	f.mu.Lock()
	f.calls++
	lose := f.calls%4 == 0
	f.mu.Unlock()
	err := f.Store.ChargeAll(ctx, cs, out)
	if lose {
		return fmt.Errorf("reply lost: %w", quota.ErrIndeterminate)
	}
	return err
}

type down struct{}

func (down) Charge(context.Context, quota.Charge) (quota.Decision, error) {
	return quota.Decision{}, quota.ErrUnavailable
}
func (down) ChargeAll(context.Context, []quota.Charge, []quota.Decision) error {
	return quota.ErrUnavailable
}
func (down) Close() error { return nil }

func TestOptions(t *testing.T) {
	for _, test := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"-h"}, 0, "-ledger"},
		{[]string{"-for", "0s"}, 2, "-for is 0s"},
		{[]string{"-for", "five"}, 2, "invalid value"},
		{[]string{"-teams", "0"}, 2, "1 to 20"},
		{[]string{"-agents", "51"}, 2, "1 to 50"},
		{[]string{"-run", "a/b"}, 2, `-run is "a/b"`},
		{[]string{"-run", "\xff"}, 2, "-run is"},
		{[]string{"file"}, 2, `unexpected argument "file"`},
		{[]string{"-check"}, 2, "-check needs"},
		{[]string{"-check", filepath.Join(t.TempDir(), "none")}, 1, "none"},
		{[]string{"-ledger", filepath.Join(t.TempDir(), "none", "file")}, 1, "none"},
	} {
		var out bytes.Buffer
		code := run(t.Context(), test.args, io.Discard, &out, on(local.New()))
		if code != test.code || !strings.Contains(out.String(), test.says) {
			t.Errorf("%q: exit status %d, %s", test.args, code, &out)
		}
	}
}

func TestLive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := quota.Must(newFleet(local.New(), options{teams: 4, agents: 5}))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		done := make(chan struct{})
		go func() {
			f.work(ctx)
			close(done)
		}()
		var out bytes.Buffer
		s := newScreen(&out, f, "memory", time.Second)
		if s.live {
			t.Error("a buffer is taken for a terminal")
		}
		s.live = true
		s.follow(done)
		text := out.String()
		if !strings.HasPrefix(text, "\x1b[?25l") || !strings.HasSuffix(text, "\x1b[?25h") {
			t.Errorf("the cursor is not hidden and shown again: %q", text)
		}
		if n := strings.Count(text, "\x1b[7A"); n < 9 {
			t.Errorf("redrawn %d times in a second", n)
		}
		for _, line := range strings.Split(text, "\n") {
			line = regexp.MustCompile(`\x1b\[[?0-9]*[a-zA-Z]`).ReplaceAllString(line, "")
			if n := len([]rune(line)); n > 80 {
				t.Errorf("a line of %d columns: %s", n, line)
			}
		}
	})
}

func TestIsTerminal(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if isTerminal(file) {
		t.Error("a file is taken for a terminal")
	}
	// The null device stands for a terminal: it is a character device, too.
	device, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	t.Setenv("TERM", "xterm")
	if !isTerminal(device) {
		t.Error("a character device is not taken for a terminal")
	}
	t.Setenv("TERM", "dumb")
	if isTerminal(device) {
		t.Error("a dumb terminal is taken for one that redraws")
	}
}
