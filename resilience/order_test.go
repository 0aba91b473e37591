package resilience_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/cachepolicy"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/fallback"
	"github.com/failsafe-go/failsafe-go/hedgepolicy"
	"github.com/failsafe-go/failsafe-go/retrypolicy"
	"github.com/failsafe-go/failsafe-go/timeout"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

type (
	result = quota.Result
	fsp    = failsafe.Policy[result]
)

// allPolicies returns one policy of each kind, the first as given.
func allPolicies(fallback resilience.Policy) []resilience.Policy {
	return []resilience.Policy{
		fallback,
		resilience.DenialMemory(nil),
		resilience.Breaker(nil),
		resilience.Bulkhead(8),
		resilience.Retry(nil),
		resilience.HedgeFailsafe(hedgepolicy.NewWithDelay[result](time.Second), nil),
		resilience.Timeout(time.Second, nil),
	}
}

// fallbacks returns what may stand outermost.
func fallbacks() map[string]resilience.Policy {
	return map[string]resilience.Policy{
		"FailOpen":   resilience.FailOpen(nil),
		"FailClosed": resilience.FailClosed(nil),
		"Fallback":   resilience.Fallback(local.New(), resilience.Instances(4), nil),
	}
}

func TestWrapOrder(t *testing.T) {
	for name, fallback := range fallbacks() {
		t.Run(name, func(t *testing.T) { testWrapOrder(t, allPolicies(fallback)) })
	}
}

func testWrapOrder(t *testing.T, all []resilience.Policy) {
	names := []string{"fallback", "memory of denials", "breaker", "bulkhead", "retry", "hedge", "timeout"}
	wrap(t, &stub{}, all...).Close()
	for i := range all {
		for j := range all {
			// Retry and hedge need a timeout, which would be two of a kind beside one.
			ps := []resilience.Policy{all[i], all[j]}
			if i != 6 && j != 6 {
				ps = append(ps, all[6])
			}
			_, err := resilience.Wrap(&stub{}, ps...)
			inner, outer := names[j], names[i]
			switch {
			case i < j && err != nil:
				t.Errorf("%s( %s ): got %v, want a store", outer, inner, err)
			case i == j && (!errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "two policies of the kind "+inner)):
				t.Errorf("%s( %s ): got %v, want an ErrInvalid of two policies", outer, inner, err)
			case i > j && (!errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "the "+inner+" is inside the "+outer) || !strings.Contains(err.Error(), "because ")):
				t.Errorf("%s( %s ): got %v, want an ErrInvalid with the reason", outer, inner, err)
			}
			if i == j || i == 6 || j == 6 {
				continue
			}
			// The same in two steps.
			first, err := resilience.Wrap(&stub{}, all[j], all[6])
			if err != nil {
				t.Fatal(err)
			}
			if _, err = resilience.Wrap(first, all[i]); (err == nil) != (i < j) {
				t.Errorf("%s( %s ) in two steps: got %v, want an error: %v", outer, inner, err, i > j)
			}
		}
	}
}

type custom struct{ fsp }

func TestWrapRefuses(t *testing.T) {
	retry := retrypolicy.NewWithDefaults[result]()
	hedge := hedgepolicy.NewWithDelay[result](time.Second)
	tm := resilience.Timeout(time.Second, nil)
	type ps = []resilience.Policy
	for want, ps := range map[string]ps{
		"the store is nil":                 nil,
		"policy 1 is nil":                  {nil},
		"the timeout is 0s":                {resilience.Timeout(0, nil)},
		"MaxCalls is -1":                   {resilience.Timeout(1, &resilience.TimeoutOptions{MaxCalls: -1})},
		"the bulkhead is 0":                {resilience.Bulkhead(0)},
		"-1 failures":                      {resilience.Breaker(&resilience.BreakerOptions{Failures: -1})},
		"a delay of -1":                    {resilience.Breaker(&resilience.BreakerOptions{Delay: -1})},
		"first delay of -1":                {resilience.Breaker(&resilience.BreakerOptions{FirstDelay: -1})},
		"FirstDelay is 2s":                 {resilience.Breaker(&resilience.BreakerOptions{FirstDelay: 2 * time.Second, Delay: time.Second})},
		"Jitter is 1.5":                    {resilience.Breaker(&resilience.BreakerOptions{Jitter: 1.5})},
		"slices of 2s":                     {resilience.Breaker(&resilience.BreakerOptions{Window: time.Second, Slice: 2 * time.Second})},
		"FailOptions.RetryAfter is -1ns":   {resilience.FailClosed(&resilience.FailOptions{RetryAfter: -1})},
		"MemoryOptions.MaxKeys is -1":      {resilience.DenialMemory(&resilience.MemoryOptions{MaxKeys: -1})},
		"-1 attempts":                      {resilience.Retry(&resilience.RetryOptions{Attempts: -1}), tm},
		"no timeout inside the retry":      {resilience.Retry(nil)},
		"no timeout inside the retry ":     {resilience.RetryFailsafe(retry, nil)}, // the blank is only for the map
		"no timeout inside the hedge":      {resilience.HedgeFailsafe(hedge, nil)},
		"accepted: RetryFailsafe":          {resilience.Failsafe(retry, nil), tm},
		"accepted: HedgeFailsafe":          {resilience.Failsafe(hedge, nil), tm},
		"returns when the store does":      {resilience.Failsafe(timeout.New[result](time.Second), nil)},
		"no store made its decisions":      {resilience.Failsafe(fallback.NewWithResult(result{}), nil)},
		"holds for one charge":             {resilience.Failsafe(cachepolicy.New[result](nil), nil)},
		"hedgepolicy is given as a retry":  {resilience.RetryFailsafe(hedge, nil), tm},
		"retrypolicy is given as a hedge":  {resilience.HedgeFailsafe(retry, nil), tm},
		"bulkhead is given as a retry":     {resilience.RetryFailsafe(bulkhead.New[result](1), nil), tm},
		"failsafe-go policy is nil":        {resilience.Failsafe(nil, nil)},
		"ProbeLimit is -1ns":               {resilience.Failsafe(bulkhead.New[result](1), &resilience.FailsafeOptions{ProbeLimit: -1})},
		"two policies of the kind breaker": {resilience.Breaker(nil), resilience.Failsafe(circuitbreaker.NewWithDefaults[result](), nil)},
	} {
		var s quota.Store = &stub{}
		if ps == nil {
			s = nil
		}
		_, err := resilience.Wrap(s, ps...)
		if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), strings.TrimSpace(want)) || !strings.Contains(err.Error(), "accepted: ") {
			t.Errorf("want %q: %v", want, err)
		}
	}
	// Policies of a kind that nobody knows are taken where they are given.
	wrap(t, &stub{}, resilience.Failsafe(custom{retry}, nil))
	wrap(t, &stub{}, resilience.RetryFailsafe(custom{retry}, nil), tm)
}

func TestUnwrap(t *testing.T) {
	for name, fallback := range fallbacks() {
		t.Run(name, func(t *testing.T) { testUnwrap(t, allPolicies(fallback)) })
	}
}

func testUnwrap(t *testing.T, all []resilience.Policy) {
	inner := &stub{atomic: driver.OneGroup}
	s := wrap(t, inner, all...)
	layers := 0
	var at quota.Store = s
	for {
		u, ok := at.(interface{ Unwrap() quota.Store })
		if !ok {
			break
		}
		if g := at.(driver.Graded).Atomicity(); g != driver.OneGroup {
			t.Errorf("atomicity of layer %d: got %v, want %v", layers, g, driver.OneGroup)
		}
		if !at.(driver.Prompt).Prompt() {
			t.Errorf("layer %d with a timeout inside is not prompt, want it to be", layers)
		}
		at = u.Unwrap()
		layers++
	}
	if layers != len(all) || at != quota.Store(inner) {
		t.Errorf("got %d layers and at the end %T, want %d and the store", layers, at, len(all))
	}
	if b := wrap(t, inner, resilience.Breaker(nil)); b.(driver.Prompt).Prompt() {
		t.Error("a breaker around a store that is not prompt is prompt, want it not to be")
	}
	if b := wrap(t, local.New(), resilience.Breaker(nil)); !b.(driver.Prompt).Prompt() || b.(driver.Graded).Atomicity() != driver.AnyKeys {
		t.Error("a breaker around a local store: want it prompt, and AnyKeys")
	}
	for range 2 {
		if err := s.Close(); err != nil || inner.closed != 1 {
			t.Errorf("Close: got %v, and the store was closed %d times; want once", err, inner.closed)
		}
	}
	if same := wrap(t, inner); same != quota.Store(inner) {
		t.Errorf("no policies: got %T, want the store", same)
	}
}

// healthy is a store that reports its health.
type healthy struct{ *stub }

func (healthy) Health(context.Context) (driver.Health, error) {
	return driver.Health{Version: "8.2"}, nil
}

// TestHealthThroughPolicies: a program that holds the outermost store finds the health report of the innermost.
func TestHealthThroughPolicies(t *testing.T) {
	tm := resilience.Timeout(time.Second, nil)
	stacks := map[string][]resilience.Policy{
		"no policy":     nil,
		"FailWithError": {resilience.FailWithError()},
		"DenialMemory":  {resilience.DenialMemory(nil)},
		"Breaker":       {resilience.Breaker(nil)},
		"Bulkhead":      {resilience.Bulkhead(1)},
		"Retry":         {resilience.Retry(nil), tm},
		"Timeout":       {tm},
		"Failsafe":      {resilience.Failsafe(bulkhead.New[result](1), nil)},
		"Failsafe with a circuit breaker": {
			resilience.Failsafe(circuitbreaker.NewWithDefaults[result](), nil)},
		"RetryFailsafe": {resilience.RetryFailsafe(retrypolicy.NewWithDefaults[result](), nil), tm},
		"HedgeFailsafe": {resilience.HedgeFailsafe(hedgepolicy.NewWithDelay[result](time.Second), nil), tm},
	}
	for name, p := range fallbacks() {
		stacks[name] = []resilience.Policy{p}
		stacks["all with "+name] = allPolicies(p)
	}
	check := func(name string, s quota.Store) {
		t.Helper()
		r, ok := driver.Find[driver.HealthReporter](s)
		if !ok {
			t.Errorf("%s: got no HealthReporter, want the store inside", name)
			return
		}
		if h, err := r.Health(bg); err != nil || h.Version != "8.2" {
			t.Errorf("%s: Health: got %+v, %v; want version 8.2", name, h, err)
		}
	}
	for name, ps := range stacks {
		for _, prompt := range []bool{false, true} {
			check(name, wrap(t, healthy{&stub{prompt: prompt}}, ps...))
		}
	}
	all := fallbacks()
	all["FailWithError"] = resilience.FailWithError()
	for name, p := range all {
		s, err := resilience.Standard(healthy{&stub{}}, p, nil)
		if err != nil {
			t.Fatal(err)
		}
		check("Standard with "+name, s)
	}
}

// TestClosed holds that the answers of a policy itself are ErrClosed after Close.
func TestClosed(t *testing.T) {
	store := local.New()
	s := wrap(t, store, resilience.FailOpen(nil), resilience.DenialMemory(nil), resilience.Breaker(&resilience.BreakerOptions{Failures: 1, FailingFor: -1}), resilience.Bulkhead(1), resilience.Timeout(time.Second, nil))
	if _, err := s.Charge(bg, charge(100)); err != nil {
		t.Fatal(err)
	}
	if d, err := s.Charge(bg, charge(100)); err != nil || d.Allowed {
		t.Fatalf("the second take: got %+v, %v; want a denial", d, err)
	}
	if d, err := s.Charge(bg, charge(100)); err != nil || d.Source != quota.FromMemory {
		t.Fatalf("the third take: got %+v, %v; want a denial from memory", d, err)
	}
	s.Close()
	_, err := s.Charge(bg, charge(100))
	wantErr(t, err, quota.ErrClosed)

	broken := wrap(t, &stub{answer: script(as(quota.ErrUnavailable))}, resilience.FailOpen(nil), resilience.Breaker(&resilience.BreakerOptions{Failures: 1, FailingFor: -1}))
	broken.Charge(bg, charge(1))
	if d, err := broken.Charge(bg, charge(1)); err != nil || d.Source != quota.FromOpen {
		t.Fatalf("with an open breaker: got %+v, %v; want a decision of FailOpen", d, err)
	}
	broken.Close()
	_, err = broken.Charge(bg, charge(1))
	wantErr(t, err, quota.ErrClosed)
}

func TestStandard(t *testing.T) {
	for _, p := range []resilience.Policy{nil, resilience.Bulkhead(1)} {
		if _, err := resilience.Standard(&stub{}, p, nil); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("fallback %v: got %v, want ErrInvalid", p, err)
		}
	}
	all := fallbacks()
	all["FailWithError"] = resilience.FailWithError()
	for _, p := range all {
		s, err := resilience.Standard(local.New(), p, nil)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := s.Charge(bg, charge(1)); err != nil || !d.Allowed || d.Source != quota.FromStore {
			t.Errorf("got %+v, %v; want a grant of the store", d, err)
		}
		s.Close()
	}
}
