package quotahttp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Options are the options of [New]. The zero value, and nil, take the defaults.
type Options struct {
	// Headers chooses the fields that tell clients of their limits; 0 is IETF.
	Headers Headers
	// FailOpen lets a request through, uncharged, where the store failed. It is not asked where a policy in
	// front of the store has decided, such as resilience.FailClosed.
	FailOpen bool
	// Refuse writes the answer to a request whose handler does not run; nil is [Refusal.ServeHTTP]. The
	// fields of the limits and Retry-After are set when it is called. It is not called for a client that
	// left.
	Refuse func(w http.ResponseWriter, r *http.Request, refusal *Refusal)
	// Error is told each error: of a request that was refused or let through because the store failed,
	// because it has no key or wrong charges, and of a settle or refund that failed. nil logs with
	// slog.Error, one a second at most, with the number of those left out. It may be called concurrently,
	// must not keep the request, and is not told of clients that left.
	Error func(r *http.Request, err error)
	// Refund gives a request's charges back if it reports true for the status of the answer, unless the
	// handler or Settle said the cost. A panic counts as 500. nil gives nothing back.
	Refund func(status int) bool
	// Settle settles the charges to limits of these names to the tokens that the answer says were used, such
	// as {"tokens": Usage.Tokens}, unless the handler did. The answer is JSON, or a stream of events, as
	// OpenAI and Anthropic write them, or as ReadUsage reads it; it is looked at while it is written, and not
	// kept. Where it tells no usage, as where the client left before its end, the estimate stays charged;
	// Error is told unless the status is 300 or more.
	Settle map[string]func(Usage) int64
	// ReadUsage finds the usage in one JSON document, the answer's body or the data of an event, of up to 1
	// MiB, and reports whether it is there; the last one counts. nil reads the forms of OpenAI and Anthropic,
	// in documents of any size.
	ReadUsage func(document []byte) (Usage, bool)
}

// New returns middleware that charges each request by all rules in one call, and lets it through if that is
// granted. Where a limit has holds ([quota.Limit.TTL]), such as one of algorithm.Held or algorithm.Concurrency, the
// charges are a [quota.Reservation] until the handler is over, however it ends: it is settled to the costs that are known
// then, else to the estimate, and slots are free again. If the process dies, its holds lapse by themselves. A nil limiter, no rules, a nil rule or a nil function in Options.Settle is [quota.ErrInvalid].
func New(limiter *quota.Limiter, o *Options, rules ...Rule) (func(http.Handler) http.Handler, error) {
	if o == nil {
		o = &Options{}
	}
	m := &middleware{limiter: limiter, rules: slices.Clone(rules), o: *o}
	m.o.Settle = maps.Clone(o.Settle)
	switch {
	case limiter == nil:
		return nil, invalid("limiter is nil; accepted: a limiter")
	case len(rules) == 0 || slices.ContainsFunc(rules, func(rule Rule) bool { return rule == nil }):
		return nil, invalid("rules are none, or one of them is nil; accepted: one or more, such as By(IP(Peer), limit)")
	}
	for name, actual := range m.o.Settle {
		if actual == nil {
			return nil, invalid("Options.Settle[%q] is nil; accepted: a function, such as Usage.Tokens", name)
		}
	}
	if m.o.Headers == 0 {
		m.o.Headers = IETF
	}
	if m.o.Refuse == nil {
		m.o.Refuse = func(w http.ResponseWriter, r *http.Request, refusal *Refusal) { refusal.ServeHTTP(w, r) }
	}
	if m.o.Error == nil {
		m.o.Error = new(errorLog).tell
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { m.serve(next, w, r) })
	}, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("quotahttp: %w: "+format, append([]any{quota.ErrInvalid}, args...)...)
}

type middleware struct {
	limiter *quota.Limiter
	rules   []Rule
	o       Options
}

func (m *middleware) serve(next http.Handler, w http.ResponseWriter, r *http.Request) {
	charges, err := m.charges(r)
	if err != nil {
		m.refuse(w, r, &Refusal{Status: http.StatusInternalServerError, RetryAfter: quota.Never, Err: err})
		return
	}
	if len(charges) == 0 {
		m.run(next, w, r, nil, nil, nil)
		return
	}
	result, reserved, err := m.ask(r.Context(), charges)
	if err != nil {
		if m.letThrough(w, r, err) {
			m.run(next, w, r, nil, nil, nil)
		}
		return
	}
	m.o.Headers.tell(w.Header(), charges, result.Decisions, len(r.Header["Origin"]) > 0)
	if !result.Granted {
		m.refuse(w, r, denial(charges, &result))
		return
	}
	m.run(next, w, r, charges, result.Decisions, reserved)
}

// ask has the charges of a request decided. Where a limit has holds they are reserved.
func (m *middleware) ask(ctx context.Context, charges []quota.Charge) (quota.Result, *quota.Reservation, error) {
	if holds(charges) {
		r, err := m.limiter.Reserve(ctx, charges...)
		if err != nil {
			return quota.Result{}, nil, err
		}
		return r.Result, r, nil
	}
	result, err := m.limiter.ChargeAll(ctx, charges...)
	return result, nil, err
}

// holds reports whether a list must be reserved: it takes or holds tokens of a limit that has holds.
func holds(charges []quota.Charge) bool {
	return slices.ContainsFunc(charges, func(c quota.Charge) bool {
		return c.Limit.TTL() > 0 && (c.Op == quota.OpTake || c.Op == quota.OpHold)
	})
}

// charges returns the charges of a request, each with its limit.
func (m *middleware) charges(r *http.Request) (charges []quota.Charge, err error) {
	for _, rule := range m.rules {
		some, err := rule(r)
		if err != nil {
			return nil, err
		}
		if charges == nil {
			charges = some
		} else {
			charges = append(charges, some...)
		}
	}
	for i := range charges {
		if c := &charges[i]; c.Limit == nil {
			if c.Limit, err = m.limiter.LimitOf(c.Key); err != nil {
				return nil, err
			}
		}
	}
	return charges, nil
}

// letThrough reports whether a request may go on though its charges failed. If not, it is answered.
func (m *middleware) letThrough(w http.ResponseWriter, r *http.Request, err error) bool {
	refusal := &Refusal{Status: http.StatusServiceUnavailable, RetryAfter: time.Second, Err: err}
	switch {
	case errors.Is(err, quota.ErrInvalid) || errors.Is(err, quota.ErrCrossSlot):
		refusal.Status, refusal.RetryAfter = http.StatusInternalServerError, quota.Never
	case errors.Is(r.Context().Err(), context.Canceled):
		const clientClosedRequest = 499 // of nginx, for logs: the connection is gone
		w.WriteHeader(clientClosedRequest)
		return false
	case m.o.FailOpen && r.Context().Err() == nil:
		m.o.Error(r, err)
		return true
	}
	m.refuse(w, r, refusal)
	return false
}

// refuse answers a request whose handler does not run.
func (m *middleware) refuse(w http.ResponseWriter, r *http.Request, refusal *Refusal) {
	if refusal.Err != nil {
		m.o.Error(r, refusal.Err)
	}
	h := w.Header()
	if len(r.Header["Origin"]) > 0 {
		h.Add(exposeField, "Retry-After")
	}
	if refusal.RetryAfter != quota.Never {
		h.Set("Retry-After", wholeSeconds(refusal.RetryAfter))
	}
	m.o.Refuse(w, r, refusal)
}

// errorLog logs errors, one a second at most.
type errorLog struct {
	mu   sync.Mutex
	next time.Time
	more int
}

func (l *errorLog) tell(r *http.Request, err error) {
	l.mu.Lock()
	now, more := time.Now(), l.more
	if now.Before(l.next) {
		l.more++
		l.mu.Unlock()
		return
	}
	l.next, l.more = now.Add(time.Second), 0
	l.mu.Unlock()
	slog.ErrorContext(r.Context(), "quotahttp: a request was not charged as it should", "error", err, "route", r.Pattern, "left out before", more)
}
