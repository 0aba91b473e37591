package quotaprom_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/observe/quotaprom"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// ledger is what callers saw: numbers by the names and labels that a scrape has for them.
type ledger struct {
	mu       sync.Mutex
	numbers  map[string]float64
	fallback float64 // calls that the fallback decided
	borrowed float64 // tokens that it charged
}

func (l *ledger) add(n float64, format string, args ...any) {
	l.numbers[fmt.Sprintf(format, args...)] += n
}

// note enters a call: its charges, and its decisions or its error. decider is the source of the deciding decision.
func (l *ledger) note(cs []quota.Charge, ds []quota.Decision, granted bool, taken uint8, decider quota.Source, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		outcome := "error"
		class := "other"
		switch {
		case errors.Is(err, quota.ErrInvalid):
			outcome, class = "refused", "invalid"
		case errors.Is(err, context.Canceled):
			outcome, class = "refused", "canceled"
		case errors.Is(err, quota.ErrIndeterminate):
			class = "indeterminate"
		case errors.Is(err, quota.ErrUnavailable):
			class = "unavailable"
		}
		if l.add(1, "errors_total{class=%s}", class); class == "canceled" {
			outcome = "error" // the store gets it, and charges nothing
		}
		if outcome == "error" {
			l.add(1, "decision_duration_seconds{source=none}")
		}
		for _, c := range cs {
			l.add(1, "decisions_total{limit=%s,op=%s,outcome=%s,source=none}", c.Limit.Name(), c.Op, outcome)
		}
		return
	}
	l.add(1, "decision_duration_seconds{source=%s}", decider)
	for i, d := range ds {
		c, outcome := cs[i], "not_made"
		if d.Source == quota.FromFallback {
			l.borrowed += float64(d.Charged)
		}
		switch {
		case d.Shadow && !d.Allowed:
			outcome = "shadow_denied"
			l.add(float64(c.Cost), "tokens_total{limit=%s,outcome=shadow_denied}", c.Limit.Name())
		case granted && d.Alternative == taken:
			outcome = "allowed"
			if d.Charged >= 0 {
				l.add(float64(d.Charged), "tokens_total{limit=%s,outcome=charged}", c.Limit.Name())
			} else {
				l.add(float64(-d.Charged), "tokens_total{limit=%s,outcome=returned}", c.Limit.Name())
			}
		case !granted && !d.Allowed:
			outcome = "denied"
			if c.Op != quota.OpPeek {
				l.add(float64(c.Cost), "tokens_total{limit=%s,outcome=denied}", c.Limit.Name())
			}
			if d.RetryAfter == quota.Never {
				l.add(1, "never_denials_total{limit=%s}", c.Limit.Name())
			} else {
				l.add(1, "denial_retry_after_seconds{limit=%s}", c.Limit.Name())
			}
		}
		l.add(1, "decisions_total{limit=%s,op=%s,outcome=%s,source=%s}", c.Limit.Name(), c.Op, outcome, d.Source)
		if c.Op != quota.OpPeek {
			l.add(1, "utilization_ratio{limit=%s}", c.Limit.Name())
		}
	}
	if slices.ContainsFunc(ds, func(d quota.Decision) bool { return d.Source == quota.FromFallback }) {
		l.fallback++
	}
}

// switched is a store that can be switched off.
type switched struct {
	quota.Store
	off atomic.Bool
}

func (s *switched) Unwrap() quota.Store { return s.Store }

func (s *switched) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if s.off.Load() {
		return quota.Decision{}, fmt.Errorf("test: %w", quota.ErrUnavailable)
	}
	return s.Store.Charge(ctx, c)
}

func (s *switched) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if s.off.Load() {
		return fmt.Errorf("test: %w", quota.ErrUnavailable)
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

// TestLoad: a scrape of a program under load equals what its callers saw, counter by counter: grants, denials, lists, shadows,
// alternatives, an outage with a fallback, and the reconciliation after it.
func TestLoad(t *testing.T) {
	t.Run("local", func(t *testing.T) { load(t, local.New()) })
	t.Run("redis", func(t *testing.T) {
		redisServer := redisserver.Start(t)
		client := redis.NewClient(&redis.Options{Addr: redisServer.Addr(), ContextTimeoutEnabled: true})
		t.Cleanup(func() { client.Close() })
		load(t, quota.Must(goredis.New(client, nil)))
	})
}

const loadKeys = 20

func load(t *testing.T, primary quota.Store) {
	store := &switched{Store: primary}
	here := local.New()
	// Timeouts would leave debts of unknown outcome.
	policies := quota.Must(resilience.Standard(store, resilience.Fallback(here, resilience.Instances(2), nil), &resilience.StandardOptions{
		Timeout: time.Minute, Breaker: &resilience.BreakerOptions{FailingFor: -1, Delay: 50 * time.Millisecond},
	}))
	m := quotaprom.New(nil)
	registry := registered(t, m)
	charger := quota.Must(quota.NewCharger(policies, observedBy(m)))
	defer charger.Close()
	m.Watch(charger)
	limits := []*quota.Limit{bucket("tokens", 5000, 100, time.Second), bucket("calls", 500, 10, time.Second), bucket("pool", 2000, 10, time.Second)}
	l := &ledger{numbers: map[string]float64{}}
	calls := testenv.Sized(300, 5000)
	phase := func() {
		var callers sync.WaitGroup
		for range 8 {
			callers.Go(func() {
				for range calls {
					call(charger, limits, l)
				}
			})
		}
		callers.Wait()
	}
	phase()
	store.off.Store(true)
	phase()
	store.off.Store(false)
	for _, limit := range limits { // until the breaker is closed, and each debt is charged
		for i := range loadKeys {
			for source := quota.FromFallback; source != quota.FromStore; {
				peek := quota.Charge{Limit: limit, Key: key(i), Op: quota.OpPeek}
				r, err := charger.ChargeAll(bg, peek)
				if err != nil {
					t.Fatal(err)
				}
				l.note([]quota.Charge{peek}, r.Decisions, r.Granted, 0, r.Decisions[0].Source, nil)
				source = r.Decisions[0].Source
			}
		}
	}
	phase()

	got := scrape(t, registry)
	delete(got, "decision_duration_seconds{source=unknown}")
	for id, want := range l.numbers {
		if got[id] != want {
			t.Errorf("%s: got %v, want %v", id, got[id], want)
		}
	}
	for id, value := range got {
		for _, family := range []string{"decisions_total", "tokens_total", "never_denials_total", "errors_total", "denial_retry_after_seconds", "decision_duration_seconds"} {
			if strings.HasPrefix(id, family) && !strings.HasSuffix(id, " sum") && value != l.numbers[id] {
				t.Errorf("%s: got %v, want %v", id, value, l.numbers[id])
			}
		}
	}
	for id, want := range map[string]float64{
		"degraded_calls_total{store=primary}":             l.fallback,
		"fallback_owed_tokens{store=primary}":             0,
		"fallback_owing_keys{store=primary}":              0,
		"fallback_reconciled_tokens_total{store=primary}": l.borrowed,
		"store_keys{store=fallback}":                      float64(here.Len()),
		"breakers_open{node=,store=primary}":              0,
		"breakers_closed{node=,store=primary}":            1,
		"bulkhead_calls{node=,store=primary}":             0,
	} {
		if value, told := got[id]; value != want || !told {
			t.Errorf("%s: got %v, want %v", id, value, want)
		}
	}
	if got["breaker_openings_total{node=,store=primary}"] == 0 || got["breaker_refused_calls_total{node=,store=primary}"] == 0 || l.fallback == 0 || l.borrowed == 0 {
		t.Errorf("the outage was none: got %v openings of the breaker, %v calls refused, %v calls of the fallback, %v tokens", got["breaker_openings_total{node=,store=primary}"],
			got["breaker_refused_calls_total{node=,store=primary}"], l.fallback, l.borrowed)
	}
	if s, ok := primary.(*local.Store); ok && got["store_keys{store=primary}"] != float64(s.Len()) {
		t.Errorf("keys: got %v, want %d", got["store_keys{store=primary}"], s.Len())
	} else if !ok && (got["store_batches_total{store=primary}"] == 0 || got["store_batched_calls_total{store=primary}"] < got["store_batches_total{store=primary}"]) {
		t.Errorf("batches: got %v of %v calls", got["store_batches_total{store=primary}"], got["store_batched_calls_total{store=primary}"])
	}
}

func key(i int) string { return fmt.Sprintf("team/%d", i) }

// call makes a random call.
func call(charger *quota.Charger, limits []*quota.Limit, l *ledger) {
	limit, k, n := limits[rand.IntN(2)], key(rand.IntN(loadKeys)), rand.Int64N(60)
	limiter := quota.Must(charger.For(limit))
	one := func(c quota.Charge, d quota.Decision, err error) {
		c.Limit, c.Key = limit, k
		l.note([]quota.Charge{c}, []quota.Decision{d}, d.Allowed, 0, d.Source, err)
	}
	list := func(r quota.Result, err error, cs ...quota.Charge) {
		source := quota.FromStore
		if err == nil {
			source = r.Decisions[r.Decider].Source
		}
		l.note(cs, r.Decisions, r.Granted, 0, source, err)
	}
	take := quota.Charge{Cost: n}
	switch rand.IntN(12) {
	case 0, 1:
		d, err := limiter.Take(bg, k, n)
		one(take, d, err)
		if err == nil && d.Allowed && d.Source == quota.FromStore {
			// Refunds of what the fallback charged lower its debt, which the ledger does not know.
			actual := rand.Int64N(80)
			settle := quota.Charge{Op: quota.OpRefund, Cost: max(d.Charged-actual, 0)}
			if actual > d.Charged {
				settle = quota.Charge{Op: quota.OpDebit, Cost: actual - d.Charged}
			}
			d, err = limiter.Settle(bg, k, d, actual)
			one(settle, d, err)
		}
	case 2:
		d, err := limiter.Peek(bg, k, n)
		one(quota.Charge{Cost: n, Op: quota.OpPeek}, d, err)
	case 3:
		d, err := limiter.Debit(bg, k, n)
		one(quota.Charge{Cost: n, Op: quota.OpDebit}, d, err)
	case 4:
		d, err := limiter.TakeUpTo(bg, k, n, n/2)
		one(quota.Charge{Cost: n, Op: quota.OpUpTo}, d, err)
	case 5:
		d, err := limiter.TakeAhead(bg, k, n, time.Second)
		one(quota.Charge{Cost: n, Op: quota.OpAhead}, d, err)
	case 6:
		d, err := limiter.Take(bg, k, 10_000)
		one(quota.Charge{Cost: 10_000}, d, err)
	case 7:
		d, err := limiter.Take(bg, k, -1)
		one(quota.Charge{Cost: -1}, d, err)
	case 8:
		ctx, cancel := context.WithCancel(bg)
		cancel()
		d, err := limiter.Take(ctx, k, n)
		one(take, d, err)
	case 9, 10:
		cs := []quota.Charge{{Limit: limits[0], Key: k, Cost: n}, {Limit: limits[1], Key: k, Cost: 1 + n/10, Shadow: rand.IntN(3) == 0}}
		r, err := charger.ChargeAll(bg, cs...)
		list(r, err, cs...)
	case 11:
		first, second := []quota.Charge{{Limit: limits[1], Key: k, Cost: n}}, []quota.Charge{{Limit: limits[2], Key: k, Cost: n}}
		r, err := charger.TakeFirst(bg, first, second)
		cs := append(slices.Clone(first), second...)
		if err != nil {
			list(r, err, cs...)
			return
		}
		ds := append(slices.Clone(r.Lists[0]), r.Lists[1]...)
		l.note(cs, ds, r.Granted, uint8(r.Taken+1), r.Decisions[r.Decider].Source, nil)
	}
}
