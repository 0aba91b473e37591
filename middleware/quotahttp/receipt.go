package quotahttp

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"

	"github.com/fleetquota/fleetquota/quota"
)

// A Receipt is the charge of a request whose handler runs. Its methods may be called concurrently, and on
// nil.
type Receipt struct {
	limiter   *quota.Limiter
	outer     *Receipt // of a middleware around this one
	charges   []quota.Charge
	decisions []quota.Decision
	reserved  *quota.Reservation // of the charges; nil where no limit has holds

	mu     sync.Mutex
	actual []int64 // the actual costs by the charges' indexes, notSaid where unknown; nil where all are
	over   bool    // the handler has returned
}

const notSaid = -1

// From returns the receipt of the request that a context belongs to; nil without the middleware.
func From(ctx context.Context) *Receipt {
	r, _ := ctx.Value(receiptKey{}).(*Receipt)
	return r
}

type receiptKey struct{}

// visit is the context of a request whose handler runs, in one piece with its receipt and the request that has the
// context: on a store in memory, a request takes about as long as its allocations.
type visit struct {
	context.Context
	receipt Receipt
	request http.Request
}

func (v *visit) Value(key any) any {
	if _, ok := key.(receiptKey); ok {
		return &v.receipt
	}
	return v.Context.Value(key)
}

// Settle says how many tokens of a limit the request used, in place of the estimate that was charged: fewer,
// or more. The correction is made when the handler is over, together with all others; a second Settle before
// that replaces the first. A handler that goes on after it returned, such as one that took over the
// connection, may settle once then, and the correction is made at once: it outlives the context, and an error
// is that of [quota.Limiter.Settle]. A request that was charged to a limit with holds is finished when the handler returns, and
// a later Settle is [quota.ErrInvalid].
//
// An actual cost below 0, and a limit of a name that the request was not charged to, is [quota.ErrInvalid]. A
// request that was charged nothing, because a rule skipped it or the store failed, has nothing to settle.
func (r *Receipt) Settle(limit string, actual int64) error {
	if actual < 0 {
		return invalid("actual cost is %d; accepted: 0 or more", actual)
	}
	return r.settle(func(c *quota.Charge) bool { return c.Limit.Name() == limit }, limit, actual)
}

// Refund says that the request used nothing: all that it was charged is given back when the handler is over.
// See Settle.
func (r *Receipt) Refund() error {
	return r.settle(func(*quota.Charge) bool { return true }, "", 0)
}

// Lost returns a channel that is closed when a hold of the request ends before its handler, see [quota.Reservation.Lost]: a
// handler of a long stream may stop then. Without a hold the channel is nil, which is never closed.
func (r *Receipt) Lost() <-chan struct{} {
	for ; r != nil; r = r.outer {
		if r.reserved != nil {
			return r.reserved.Lost()
		}
	}
	return nil
}

// settle notes the actual cost of some charges.
func (r *Receipt) settle(of func(*quota.Charge) bool, limit string, actual int64) error {
	if r == nil {
		return invalid("context is one without the middleware of New; accepted: that of a request, inside the middleware")
	}
	found, charged := false, false
	for ; r != nil; r = r.outer {
		var late []quota.Charge
		r.mu.Lock()
		for i := range r.charges {
			charged = true
			if c := &r.charges[i]; !of(c) {
				continue
			} else if found = true; r.over && r.reserved != nil {
				r.mu.Unlock()
				return invalid("reservation is finished; accepted: a Settle before the handler returns")
			} else if r.over {
				late = r.correct(late, i, actual)
			} else {
				if r.actual == nil {
					r.actual = notSaidOf(len(r.charges))
				}
				r.actual[i] = actual
			}
		}
		r.mu.Unlock()
		if len(late) > 0 {
			if _, err := r.limiter.ChargeAll(context.Background(), late...); err != nil {
				return err
			}
		}
	}
	if charged && !found {
		return invalid("limit is %.64q; accepted: one that the request was charged to", limit)
	}
	return nil
}

func notSaidOf(n int) []int64 {
	actual := make([]int64, n)
	for i := range actual {
		actual[i] = notSaid
	}
	return actual
}

// correct appends the correction of charge i, unless it was right.
func (r *Receipt) correct(to []quota.Charge, i int, actual int64) []quota.Charge {
	if d := r.decisions[i]; d.Charged != actual && (d.Allowed || !d.Shadow) {
		to = append(to, r.charges[i].Settle(d, actual))
	}
	return to
}

// run runs the handler of a request that was charged, and makes the corrections when it is over, however it ends.
func (m *middleware) run(next http.Handler, w http.ResponseWriter, r *http.Request, charges []quota.Charge, decisions []quota.Decision, reserved *quota.Reservation) {
	v := &visit{Context: r.Context(), receipt: Receipt{limiter: m.limiter, outer: From(r.Context()), charges: charges, decisions: decisions, reserved: reserved}}
	v.request = *r.WithContext(v)
	r = &v.request
	var answer *writer
	if m.o.Refund != nil || len(m.o.Settle) > 0 {
		answer = &writer{ResponseWriter: w}
		if len(m.o.Settle) > 0 && len(charges) > 0 {
			answer.usage = &usageReader{read: m.o.ReadUsage}
		}
		w = answer.wrap()
	}
	returned := false
	defer func() { m.over(r, &v.receipt, answer, returned) }()
	next.ServeHTTP(w, r)
	returned = true
}

// over makes the corrections of a request whose handler has returned or panicked.
func (m *middleware) over(r *http.Request, receipt *Receipt, answer *writer, returned bool) {
	receipt.mu.Lock()
	actual := receipt.actual
	receipt.over = true
	receipt.mu.Unlock()
	if answer != nil {
		actual = m.byAnswer(r, receipt, answer, returned, actual)
	}
	if receipt.reserved != nil {
		m.finish(r, receipt, actual)
		return
	}
	var corrections []quota.Charge
	for i, n := range actual {
		if n != notSaid {
			corrections = receipt.correct(corrections, i, n)
		}
	}
	if len(corrections) == 0 {
		return
	}
	if _, err := m.limiter.ChargeAll(r.Context(), corrections...); err != nil { // corrections outlive the context
		m.o.Error(r, err)
	}
}

// finish settles the reservation of a request. Costs that are not known are those that were reserved.
func (m *middleware) finish(r *http.Request, receipt *Receipt, actual []int64) {
	used := slices.Clone(actual)
	for i, n := range used {
		if n == notSaid {
			used[i] = receipt.decisions[i].Held + receipt.decisions[i].Charged
		}
	}
	if err := receipt.reserved.Settle(r.Context(), used...); err != nil { // it outlives the context
		m.o.Error(r, err)
	}
}

// byAnswer adds the actual costs that an answer tells to those that the handler said.
func (m *middleware) byAnswer(r *http.Request, receipt *Receipt, answer *writer, returned bool, said []int64) []int64 {
	actual := said
	if said == nil {
		actual = notSaidOf(len(receipt.charges))
	}
	status := answer.end()
	if !returned {
		status = http.StatusInternalServerError
	}
	if answer.usage != nil {
		usage, found := answer.usage.result()
		missing := false
		for i := range actual {
			if settle := m.o.Settle[receipt.charges[i].Limit.Name()]; settle != nil && actual[i] == notSaid {
				if missing = !found; found {
					actual[i] = settle(usage)
				}
			}
		}
		if missing && status < 300 && r.Method != http.MethodHead && r.Context().Err() == nil {
			m.o.Error(r, errNoUsage)
		}
	}
	if said == nil && m.o.Refund != nil && m.o.Refund(status) {
		for i := range actual {
			if actual[i] == notSaid {
				actual[i] = 0
			}
		}
	}
	return actual
}

var errNoUsage = errors.New("quotahttp: the answer tells no usage, and its estimate stays charged")
