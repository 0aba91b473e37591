package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

var (
	agentTokens = quota.Must(algorithm.ParseLimit("agent: 400 burst 40/1s bucket"))
	teamTokens  = quota.Must(algorithm.ParseLimit("team: 1500 burst 100/1s bucket"))
)

// fleet is the agents of three teams, and the pages that show them. The first agent of each team asks most.
type fleet struct {
	limiter *quota.Limiter
	tracer  trace.Tracer
	tracers *sdktrace.TracerProvider
	spans   *recent
	pages   *http.ServeMux
	ledger  *ledger
}

// keys are the agents. The last name is an attempt to get a script into a page.
var keys = func() (keys []string) {
	for team := range 3 {
		for agent := range 4 {
			keys = append(keys, fmt.Sprintf("team-%d/agent-%d", team+1, agent+1))
		}
	}
	return append(keys, `team-3/<script>document.title="taken over"</script>`)
}()

// work lets the agents work until the context ends or, unless calls is 0, each has made so many calls.
func (f *fleet) work(ctx context.Context, calls int, think time.Duration) {
	var all sync.WaitGroup
	for i, key := range keys {
		all.Go(func() {
			for n := 0; (calls == 0 || n < calls) && ctx.Err() == nil; n++ {
				f.job(key, 1+rand.Int64N(40)*int64(1+3/(1+i%4)))
				select {
				case <-ctx.Done():
				case <-time.After(time.Duration(rand.ExpFloat64() * float64(think))):
				}
			}
		})
	}
	all.Wait()
}

// job charges an estimate to an agent and its team, and settles it where the job took less or more. A call that has begun goes
// on when the run ends, or its outcome would be unknown to the ledger.
func (f *fleet) job(key string, estimate int64) {
	ctx, span := f.tracer.Start(context.Background(), "job")
	defer span.End()
	charges := []quota.Charge{{Limit: agentTokens, Key: key, Cost: estimate}, {Limit: teamTokens, Key: quota.Group(key), Cost: estimate}}
	r, err := f.limiter.ChargeAll(ctx, charges...)
	f.ledger.note(charges, r, err)
	if err != nil || !r.Granted || rand.IntN(2) == 0 {
		return
	}
	actual := estimate * (50 + rand.Int64N(100)) / 100
	for i, c := range charges {
		charges[i] = c.Settle(r.Decisions[i], actual)
	}
	r, err = f.limiter.ChargeAll(ctx, charges...)
	f.ledger.note(charges, r, err)
}

func (f *fleet) close() {
	f.limiter.Close()
	_ = f.tracers.Shutdown(context.Background())
}

// ledger has the sums of the agents' own calls.
type ledger struct {
	mu   sync.Mutex
	sums sums
}

// sums are sums of calls: tokens by limit and key, and charges by limit, operation and outcome.
type sums struct {
	Granted   int64                       `json:"granted"` // calls
	Denied    int64                       `json:"denied"`
	Failed    int64                       `json:"failed"`
	Tokens    map[string]map[string]place `json:"tokens"`
	Decisions map[string]int64            `json:"decisions"` // such as "agent take allowed"
}

// place is the tokens of a limit and key.
type place struct {
	Used   int64 `json:"used"`
	Back   int64 `json:"back"`
	Denied int64 `json:"denied"`
}

func newLedger() *ledger {
	return &ledger{sums: sums{Tokens: map[string]map[string]place{}, Decisions: map[string]int64{}}}
}

func (l *ledger) note(charges []quota.Charge, r quota.Result, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &l.sums
	switch {
	case err != nil:
		s.Failed++
	case r.Granted:
		s.Granted++
	default:
		s.Denied++
	}
	for i, c := range charges {
		limit, outcome := c.Limit.Name(), "error"
		if s.Tokens[limit] == nil {
			s.Tokens[limit] = map[string]place{}
		}
		p := s.Tokens[limit][c.Key]
		if err == nil {
			switch d := r.Decisions[i]; {
			case r.Granted && d.Charged >= 0:
				outcome = "allowed"
				p.Used += d.Charged
			case r.Granted:
				outcome = "allowed"
				p.Back -= d.Charged
			case d.Allowed:
				outcome = "not_made" // the other charge of the list was denied
			default:
				outcome = "denied"
				p.Denied += c.Cost
			}
		}
		s.Tokens[limit][c.Key] = p
		s.Decisions[limit+" "+c.Op.String()+" "+outcome]++
	}
}

// summary is a line for a terminal.
func (l *ledger) summary() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprintf("%d calls granted, %d denied, %d failed", l.sums.Granted, l.sums.Denied, l.sums.Failed)
}

// ServeHTTP serves the ledger as JSON.
func (l *ledger) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(l.sums)
}

// recent is an exporter that keeps the latest spans.
type recent struct {
	mu     sync.Mutex
	spans  []sdktrace.ReadOnlySpan // a ring
	next   int
	events map[string]int64 // of all spans, by name
}

const maxSpans = 1000

func (r *recent) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, span := range spans {
		if len(r.spans) < maxSpans {
			r.spans = append(r.spans, span)
		} else {
			r.spans[r.next] = span
		}
		r.next = (r.next + 1) % maxSpans
		for _, e := range span.Events() {
			if r.events == nil {
				r.events = map[string]int64{}
			}
			r.events[e.Name]++
		}
	}
	return nil
}

// Shutdown does nothing: the spans stay to be seen.
func (r *recent) Shutdown(context.Context) error { return nil }

// ServeHTTP serves the spans as JSON, the latest last.
func (r *recent) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	type event struct {
		Name       string         `json:"name"`
		Attributes map[string]any `json:"attributes"`
	}
	type span struct {
		Name   string  `json:"name"`
		Trace  string  `json:"trace"`
		ID     string  `json:"id"`
		Parent string  `json:"parent,omitempty"`
		TookUS int64   `json:"took_us"`
		Events []event `json:"events,omitempty"`
	}
	r.mu.Lock()
	list := make([]span, 0, len(r.spans))
	for i := range r.spans {
		s := r.spans[i]
		if len(r.spans) == maxSpans {
			s = r.spans[(r.next+i)%maxSpans]
		}
		of := span{Name: s.Name(), Trace: s.SpanContext().TraceID().String(), ID: s.SpanContext().SpanID().String(), TookUS: s.EndTime().Sub(s.StartTime()).Microseconds()}
		if s.Parent().IsValid() {
			of.Parent = s.Parent().SpanID().String()
		}
		for _, e := range s.Events() {
			attributes := map[string]any{}
			for _, kv := range e.Attributes {
				attributes[string(kv.Key)] = kv.Value.AsInterface()
			}
			of.Events = append(of.Events, event{e.Name, attributes})
		}
		list = append(list, of)
	}
	r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list)
}
