package resilience_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/hedgepolicy"
	"github.com/failsafe-go/failsafe-go/retrypolicy"

	"github.com/fleetquota/fleetquota/backend/lease"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

//go:generate go test -run ^TestOperations$ -update .

var update = flag.Bool("update", false, "write the tables of the documents that are found by tests")

// operations are the ways to ask, in the order of the table. Each makes the charge of a key, by the receipt of an earlier take of
// 3 tokens. A call is one charge, unless the wrapper's moment takes a key of another group.
var operations = []struct {
	name string
	of   func(c quota.Charge, receipt quota.Decision) quota.Charge
}{
	{"take", func(c quota.Charge, _ quota.Decision) quota.Charge { return c }},
	{"up to", func(c quota.Charge, _ quota.Decision) quota.Charge {
		c.Op, c.Least = quota.OpUpTo, 1
		return c
	}},
	{"ahead", func(c quota.Charge, _ quota.Decision) quota.Charge {
		c.Op, c.Within = quota.OpAhead, time.Hour
		return c
	}},
	{"shadow", func(c quota.Charge, _ quota.Decision) quota.Charge {
		c.Shadow = true
		return c
	}},
	{"floor", func(c quota.Charge, _ quota.Decision) quota.Charge {
		c.Floor = 1
		return c
	}},
	{"first", func(c quota.Charge, _ quota.Decision) quota.Charge { return c }},
	{"wait", func(c quota.Charge, _ quota.Decision) quota.Charge { return c }},
	{"with an id", func(c quota.Charge, _ quota.Decision) quota.Charge { return withID(c, "id") }},
	{"settle", func(c quota.Charge, d quota.Decision) quota.Charge { return c.Settle(d, 5) }},
	{"refund", func(c quota.Charge, d quota.Decision) quota.Charge { return c.Refund(d, 2) }},
	{"debit", func(c quota.Charge, _ quota.Decision) quota.Charge {
		c.Op = quota.OpDebit
		return c
	}},
	{"reset", func(c quota.Charge, _ quota.Decision) quota.Charge {
		c.Op, c.Cost = quota.OpReset, 0
		return c
	}},
	{"peek", func(c quota.Charge, _ quota.Decision) quota.Charge {
		c.Op = quota.OpPeek
		return c
	}},
}

// wrapper is a wrapper of stores in one of the moments for which it is made.
type wrapper struct {
	name, moment string
	make         func(t *testing.T, p *probe) quota.Store
	// begin brings the moment about, by the store below and by calls for other keys; nil leaves all as it is.
	begin func(r *operationRig)
	// own says that receipts are of takes in that moment, rather than before.
	own bool
	// apart has each call take two keys, of two groups.
	apart bool
	// why are the reasons of operations that are refused, or end with the store's error; "" is of all of them.
	why map[string]string
}

// wide is a limit that leaves tokens for chunks.
var wide = bucket("wide", 1_000_000, 10, time.Second)

func policy(make func() resilience.Policy) func(*testing.T, *probe) quota.Store {
	return func(t *testing.T, p *probe) quota.Store {
		return wrap(t, p, make(), resilience.Timeout(time.Second, nil))
	}
}

func alone() resilience.Policy {
	return resilience.Fallback(local.New(), resilience.Instances(1), nil)
}

func fastBreaker() resilience.Policy {
	return resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1})
}

func failsafeBreaker() resilience.Policy {
	return resilience.Failsafe(circuitbreaker.NewBuilder[result]().WithFailureThreshold(3).WithDelay(time.Minute).Build(), nil)
}

func timeoutOnly(t *testing.T, p *probe) quota.Store {
	return wrap(t, p, resilience.Timeout(time.Second, nil))
}

func leased(t *testing.T, p *probe) quota.Store {
	return quota.Must(lease.New(p, &lease.Options{Instances: resilience.Instances(1), Lifetime: time.Hour, Clock: time.Now}))
}

// spreading is the adapter of stores that splits lists, over keys in memory.
func spreading(t *testing.T, p *probe) quota.Store {
	return quota.Must(driver.NewCAS(&cells{probe: p, entries: map[string]driver.Entry{}}, &driver.Options{Atomicity: driver.OneGroup, Split: true}))
}

func down(r *operationRig) {
	r.probe.set(func(context.Context, int) error { return as(quota.ErrUnavailable) })
}

// opened has a breaker open.
func opened(r *operationRig) {
	down(r)
	for range 3 {
		r.store.Charge(bg, quota.Charge{Limit: wide, Key: "other", Cost: 1})
	}
}

// slowly has the store answer the first call late, or never.
func slowly(r *operationRig) {
	r.probe.set(func(ctx context.Context, n int) error {
		if n > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Minute):
		}
		return fmt.Errorf("test: %w: %w", quota.ErrIndeterminate, ctx.Err())
	})
}

// failsOnce has the store refuse the first call.
func failsOnce(r *operationRig) {
	r.probe.set(func(_ context.Context, n int) error {
		if n == 0 {
			return as(quota.ErrUnavailable)
		}
		return nil
	})
}

const (
	notAnswered = "an answer would hide that it was not made"
	notRepeated = "a repeat might charge twice: a request id makes it safe"
)

var correcting = map[string]string{"settle": notAnswered, "refund": notAnswered, "debit": notAnswered, "reset": notAnswered}

var repeating = func() map[string]string {
	why := map[string]string{}
	for _, name := range []string{"take", "up to", "ahead", "shadow", "floor", "first", "wait", "settle", "refund", "debit", "reset"} {
		why[name] = notRepeated
	}
	return why
}()

var wrappers = []wrapper{
	{name: "`Fallback`", make: policy(alone)},
	{name: "`FailOpen`", make: policy(func() resilience.Policy { return resilience.FailOpen(nil) })},
	{name: "`FailClosed`", make: policy(func() resilience.Policy { return resilience.FailClosed(nil) })},
	{name: "`FailWithError`", make: policy(resilience.FailWithError)},
	{name: "`DenialMemory`", make: policy(func() resilience.Policy { return resilience.DenialMemory(nil) })},
	{name: "`Breaker`", make: policy(fastBreaker)},
	{name: "`Failsafe`", make: policy(failsafeBreaker)},
	{name: "`Bulkhead`", make: policy(func() resilience.Policy { return resilience.Bulkhead(1) })},
	{name: "`Retry`", make: policy(func() resilience.Policy { return resilience.Retry(nil) })},
	{name: "`RetryFailsafe`", make: policy(func() resilience.Policy { return resilience.RetryFailsafe(retrypolicy.NewWithDefaults[result](), nil) })},
	{name: "`HedgeFailsafe`", make: policy(hedge)},
	{name: "`Timeout`", make: timeoutOnly},
	{name: "splitting adapter", make: spreading},

	{name: "`Fallback`", moment: "store down", make: policy(alone), begin: down, why: map[string]string{
		"refund": "the store charged it, and alone can give it back", "reset": "the store's state would stay",
	}},
	{name: "`Fallback`", moment: "store down, receipts of the fallback", make: policy(alone), begin: down, own: true, why: map[string]string{
		"reset": "the store's state would stay",
	}},
	{name: "`FailOpen`", moment: "store down", make: policy(func() resilience.Policy { return resilience.FailOpen(nil) }), begin: down, why: correcting},
	{name: "`FailClosed`", moment: "store down", make: policy(func() resilience.Policy { return resilience.FailClosed(nil) }), begin: down, why: correcting},
	{name: "`FailWithError`", moment: "store down", make: policy(resilience.FailWithError), begin: down, why: map[string]string{"": "the caller asked for errors"}},
	{name: "`DenialMemory`", moment: "key exhausted", make: policy(func() resilience.Policy { return resilience.DenialMemory(nil) }), begin: func(r *operationRig) {
		r.store.Charge(bg, quota.Charge{Limit: wide, Key: r.keys[0], Cost: wide.Spec().Capacity - 3})
		r.store.Charge(bg, quota.Charge{Limit: wide, Key: r.keys[0], Cost: 1})
	}},
	{name: "`Breaker`", moment: "open", make: policy(fastBreaker), begin: opened, why: map[string]string{"": "the store is left alone"}},
	{name: "`Failsafe`", moment: "open", make: policy(failsafeBreaker), begin: opened, why: map[string]string{"": "the store is left alone"}},
	{name: "`Bulkhead`", moment: "full", make: policy(func() resilience.Policy { return resilience.Bulkhead(1) }), begin: func(r *operationRig) {
		slowly(r)
		go r.store.Charge(bg, quota.Charge{Limit: wide, Key: "other", Cost: 1})
		synctest.Wait()
	}, why: map[string]string{"": "the calls in flight are as many as they may be"}},
	{name: "`Retry`", moment: "first attempt fails", make: policy(func() resilience.Policy { return resilience.Retry(nil) }), begin: failsOnce, why: repeating},
	{name: "`RetryFailsafe`", moment: "first attempt fails", make: policy(func() resilience.Policy { return resilience.RetryFailsafe(retrypolicy.NewWithDefaults[result](), nil) }), begin: failsOnce, why: repeating},
	{name: "`HedgeFailsafe`", moment: "first attempt slow", make: policy(hedge), begin: slowly, why: repeating},
	{name: "`Timeout`", moment: "store slow", make: timeoutOnly, begin: slowly, why: map[string]string{"": "the time is over; the error says that it may have been charged"}},
	{name: "`lease`", moment: "no lease", make: leased},
	{name: "`lease`", moment: "lease of the key", make: leased, own: true, begin: func(r *operationRig) {
		for range 1000 { // chunks grow with the demand
			r.store.Charge(bg, quota.Charge{Limit: wide, Key: r.keys[0], Cost: 1})
		}
	}},
	{name: "`Standard`", moment: "keys on two nodes", apart: true, make: func(t *testing.T, p *probe) quota.Store {
		return standard(t, placed{p}, resilience.FailWithError(), nil)
	}, why: map[string]string{
		"first": "the limiter then asks for one list after the other", "with an id": "an id holds within one group",
	}},
	{name: "splitting adapter", moment: "keys of two groups", make: spreading, apart: true, why: map[string]string{
		"first": "the limiter then asks for one list after the other", "with an id": "an id holds within one group",
	}},
}

func hedge() resilience.Policy {
	return resilience.HedgeFailsafe(hedgepolicy.NewBuilderWithDelay[result](10*time.Millisecond).Build(), nil)
}

// operationRig is a wrapper around a store that records.
type operationRig struct {
	probe *probe
	store quota.Store
	keys  []string
}

// probe is a store that records its calls, and may fail.
type probe struct {
	quota.Store
	mu    sync.Mutex
	calls [][]quota.Charge
	fail  func(ctx context.Context, n int) error // of the nth call since it was set
	n     int
}

func (p *probe) set(fail func(ctx context.Context, n int) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fail, p.n, p.calls = fail, 0, nil
}

// record notes a call, and returns the error that it ends with.
func (p *probe) record(ctx context.Context, cs []quota.Charge) error {
	p.mu.Lock()
	p.calls = append(p.calls, slices.Clone(cs))
	n, fail := p.n, p.fail
	p.n++
	p.mu.Unlock()
	if fail == nil {
		return nil
	}
	return fail(ctx, n)
}

func (p *probe) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if err := p.record(ctx, []quota.Charge{c}); err != nil {
		return quota.Decision{}, err
	}
	return p.Store.Charge(ctx, c)
}

func (p *probe) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := p.record(ctx, cs); err != nil {
		return err
	}
	return p.Store.ChargeAll(ctx, cs, out)
}

func (p *probe) Prompt() bool { return true }

// placed is a probe each of whose keys is on a node of its own.
type placed struct{ *probe }

func (placed) Node(c quota.Charge) string { return c.Key }

func (placed) Refresh(context.Context) error { return nil }

// cells is a database in memory. Its loads are recorded as calls.
type cells struct {
	probe   *probe
	mu      sync.Mutex
	entries map[string]driver.Entry
}

func (d *cells) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.probe.record(ctx, nil)
	var all []driver.Entry
	for _, key := range keys {
		all = append(all, driver.Entry{Key: key, Value: d.entries[key].Value})
	}
	return all, quota.Micros(time.Now().UnixMicro()), nil
}

func (d *cells) Swap(_ context.Context, changes []driver.Change) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range changes {
		if d.entries[c.Old.Key].Value != c.Old.Value {
			return false, nil
		}
	}
	for _, c := range changes {
		d.entries[c.Old.Key] = driver.Entry{Value: c.Value}
	}
	return true, nil
}

// asked is a store that records the first call that a limiter makes, and its answer.
type asked struct {
	quota.Store
	cs   []quota.Charge
	out  []quota.Decision
	err  error
	seen [][]quota.Charge
	p    *probe
}

func (a *asked) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := a.Store.Charge(ctx, c)
	a.note([]quota.Charge{c}, []quota.Decision{d}, err)
	return d, err
}

func (a *asked) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	err := a.Store.ChargeAll(ctx, cs, out)
	a.note(cs, out, err)
	return err
}

func (a *asked) note(cs []quota.Charge, out []quota.Decision, err error) {
	if a.cs == nil {
		a.p.mu.Lock()
		defer a.p.mu.Unlock()
		a.cs, a.out, a.err, a.seen = slices.Clone(cs), slices.Clone(out), err, slices.Clone(a.p.calls)
	}
}

// perform makes an operation through a wrapper, and returns what the wrapper did.
func perform(t *testing.T, w *wrapper, op int) (did string) {
	synctest.Test(t, func(t *testing.T) {
		p := &probe{Store: local.New()}
		r := &operationRig{probe: p, store: w.make(t, p), keys: []string{"a"}}
		if w.apart {
			r.keys = append(r.keys, "b")
		}
		defer time.Sleep(2 * time.Minute) // calls that hang end
		defer r.store.Close()
		receipts := make([]quota.Decision, len(r.keys))
		take := func() {
			for i, key := range r.keys {
				d, err := r.store.Charge(bg, quota.Charge{Limit: wide, Key: key, Cost: 3})
				if err != nil {
					t.Errorf("a receipt: got %v, want one", err)
				}
				receipts[i] = d
			}
		}
		if !w.own {
			take()
		}
		p.set(nil)
		if w.begin != nil {
			w.begin(r)
		}
		if w.own {
			take()
		}
		p.mu.Lock()
		if p.n, p.calls = 0, nil; w.moment == "full" {
			p.n = 1
		}
		p.mu.Unlock()

		a := &asked{Store: r.store, p: p}
		lim := quota.Must(quota.NewLimiter(a, wide, nil))
		var cs []quota.Charge
		for i, key := range r.keys {
			c := operations[op].of(quota.Charge{Limit: wide, Key: key, Cost: 2}, receipts[i])
			cs = append(cs, c)
		}
		ctx, cancel := context.WithTimeout(bg, 2*time.Minute)
		defer cancel()
		var err error
		switch operations[op].name {
		case "first":
			other := cs[0]
			other.Key = r.keys[len(r.keys)-1]
			if !w.apart {
				other.Cost = 1
			}
			_, err = lim.TakeFirst(ctx, cs[:1], []quota.Charge{other})
		case "wait":
			_, err = lim.WaitAll(ctx, cs...)
		default:
			_, err = lim.ChargeAll(ctx, cs...)
		}
		did = a.did(err)
	})
	return did
}

// did returns what the store did with a call, after which the limiter returned err.
func (a *asked) did(err error) string {
	if a.cs == nil {
		a.err = err
	}
	same := 0
	for _, cs := range a.seen {
		if cs == nil || slices.EqualFunc(cs, a.cs, func(x, y quota.Charge) bool { return driver.SameCharge(x, y) && x.ID == y.ID }) {
			same++
		}
	}
	switch {
	case a.err != nil && len(a.seen) == 0:
		return "refused"
	case a.err != nil:
		return "error"
	case len(a.seen) == 0, a.out[0].Source != quota.FromStore && a.out[0].Source != quota.FromLease:
		return "decided"
	case a.out[0].Split:
		return "in parts"
	case same == 1:
		return "passed"
	case same > 1:
		return "repeated"
	}
	return "changed"
}

const tableBegins, tableEnds = "<!-- operations: go generate ./resilience writes this table -->\n", "<!-- end of operations -->\n"

// TestOperations performs each operation through each wrapper, in the moments for which the wrapper is made, and compares the table
// in docs/resilience.md with what the wrappers did. Each refusal has a reason.
func TestOperations(t *testing.T) {
	type row struct{ names, cells string }
	var rows []row
	var reasons []string
	for i := range wrappers {
		w := &wrappers[i]
		var cells []string
		why := map[string][]string{} // operations by reason
		for op := range operations {
			did, name := perform(t, w, op), operations[op].name
			cells = append(cells, did)
			reason := w.why[name]
			if reason == "" {
				reason = w.why[""]
			}
			if fails := did == "refused" || did == "error"; fails != (reason != "") {
				t.Errorf("%s, %s, %s: got %s with the reason %q, want a reason where it is not done", w.name, w.moment, name, did, reason)
			}
			if reason != "" {
				why[reason] = append(why[reason], name)
			}
		}
		title := w.name
		if w.moment != "" {
			title += ", " + w.moment
		}
		line := strings.Join(cells, " | ")
		for _, reason := range sortedKeys(why) {
			of := strings.Join(why[reason], ", ")
			if len(why[reason]) == len(operations) {
				of = "all"
			}
			reasons = append(reasons, fmt.Sprintf("- %s; %s: %s.\n", title, of, reason))
		}
		if last := slices.IndexFunc(rows, func(r row) bool { return r.cells == line }); last >= 0 && w.moment == "" {
			rows[last].names += ", " + title
			continue
		}
		rows = append(rows, row{title, line})
	}
	var b strings.Builder
	b.WriteString(tableBegins + "| wrapper |")
	for _, op := range operations {
		fmt.Fprintf(&b, " %s |", op.name)
	}
	fmt.Fprintf(&b, "\n|---|%s\n", strings.Repeat("---|", len(operations)))
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %s |\n", r.names, r.cells)
	}
	b.WriteString("\nThe reasons of what is refused, or ends with an error:\n\n" + strings.Join(reasons, "") + tableEnds)

	const path = "../docs/resilience.md"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := bytes.Index(text, []byte(tableBegins)), bytes.Index(text, []byte(tableEnds))
	if begin < 0 || end < begin {
		t.Fatalf("%s: got no table between %q and %q", path, tableBegins, tableEnds)
	}
	end += len(tableEnds)
	if got := string(text[begin:end]); got == b.String() || *update && !t.Failed() {
		if *update {
			err = os.WriteFile(path, slices.Concat(text[:begin], []byte(b.String()), text[end:]), 0o644)
		}
	} else {
		err = errors.New("the table differs; go generate ./resilience writes it anew:\n" + b.String())
	}
	if err != nil {
		t.Error(err)
	}
}

func sortedKeys(m map[string][]string) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
