package resilience

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// closeWorkers is how many keys' debts Close charges at a time, and closePasses how often in a row it tries
// when no debt can be charged.
const (
	closeWorkers = 16
	closePasses  = 3
)

// Close charges the primary the debts of all keys, if it can, and closes both stores.
func (f *fallback) Close() error { return f.end(f.close) }

func (f *fallback) close() (err error) {
	defer func() { err = errors.Join(err, f.store.Close()) }() // even if the primary panics
	if f.closeWithin > 0 {
		f.chargeAll()
	}
	if tokens, debtors := f.debts(); tokens > 0 {
		f.notes.send("fallback", fmt.Sprintf("closed: %d tokens of %d keys that were admitted here were not charged to the store", tokens, len(debtors)), nil)
	}
	return f.inner.Close()
}

// debts returns how much all keys owe together, and a charge of each key that owes.
func (f *fallback) debts() (tokens int64, debtors []quota.Charge) {
	for i := range f.tables {
		t := &f.tables[i]
		t.mu.Lock()
		for _, k := range t.all {
			if k.debt.owed > 0 {
				tokens = plus(tokens, k.debt.owed)
				debtors = append(debtors, quota.Charge{Limit: k.limit, Key: k.id.key})
			}
		}
		t.mu.Unlock()
	}
	return tokens, debtors
}

// chargeAll charges the primary all debts, within the time for that and as long as the primary decides. A
// reconciliation of unknown outcome is repeated; for the probe of an open breaker it waits.
func (f *fallback) chargeAll() {
	ctx, cancel := context.WithTimeout(context.Background(), f.closeWithin)
	defer cancel()
	tokens, debtors := f.debts()
	for failed := 0; tokens > 0 && failed < closePasses && ctx.Err() == nil; failed++ {
		err := f.chargeEach(ctx, debtors)
		before := tokens
		if tokens, debtors = f.debts(); tokens < before {
			failed = -1
		}
		if wait := retryAfter(err); wait > 0 {
			if end, _ := ctx.Deadline(); time.Until(end) <= wait {
				return
			}
			time.Sleep(wait)
		}
	}
}

// chargeEach charges the primary the debt of each key, and returns one of the errors. It does not wait beyond
// the context's end for a store that is not prompt.
func (f *fallback) chargeEach(ctx context.Context, debtors []quota.Charge) error {
	var mu sync.Mutex
	var failure error
	next := func() (c quota.Charge, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if len(debtors) == 0 || ctx.Err() != nil {
			return c, false
		}
		c, debtors = debtors[0], debtors[1:]
		return c, true
	}
	var workers sync.WaitGroup
	for range min(closeWorkers, len(debtors)) {
		workers.Go(func() {
			defer func() {
				if v := recover(); v != nil {
					f.notes.abandonedPanic(newPanic(v))
				}
			}()
			for c, ok := next(); ok; c, ok = next() {
				if err := f.reconcile(ctx, []quota.Charge{c}); err != nil {
					mu.Lock()
					failure = err
					mu.Unlock()
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		workers.Wait()
		close(done)
	}()
	var late <-chan struct{}
	if !driver.IsPrompt(f.inner) {
		late = ctx.Done()
	}
	select {
	case <-done:
	case <-late:
	}
	mu.Lock()
	defer mu.Unlock()
	return failure
}
