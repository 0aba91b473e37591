package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

// The limits of the tenant, whose holds lapse soon, because a process of this fleet is killed and the run must see its end.
const (
	ttl        = 3 * time.Second
	mostTokens = 400 // of one answer
	tenant     = "acme"
	reserve    = 25 // percent of the tokens and streams that free requests leave to paid ones
)

var (
	requests = quota.NewLimit("requests", algorithm.SlidingWindow(3000, time.Minute))
	tokens   = quota.NewLimit("tokens", algorithm.Held(algorithm.TokenBucket(12_000, 240_000, time.Minute), ttl))
	budget   = quota.NewLimit("budget", algorithm.Held(algorithm.Calendar(1_000_000, algorithm.Monthly(15).In("Europe/Berlin")), ttl))
	streams  = quota.NewLimit("streams", algorithm.Concurrency(24, ttl))
)

// event is a message of a gateway about a stream: it began or ended, or its tokens were charged.
type event struct {
	At      time.Time
	Streams int   `json:",omitempty"` // 1 where one began, -1 where it ended
	Spent   int64 `json:",omitempty"` // tokens of the budget
	Lost    int   `json:",omitempty"` // streams that were stopped, for their holds were lost
}

// gateway answers requests for text by a model that makes it up, within the limits of the tenant.
type gateway struct {
	limiter *quota.Limiter
	server  *http.Server
	addr    string

	mu   sync.Mutex
	tell func(event)
}

// serve begins a gateway on a store.
func serve(store quota.Store, tell func(event)) (*gateway, error) {
	g := &gateway{tell: tell}
	var err error
	if g.limiter, err = quota.NewLimiter(store, requests, &quota.Options{Observers: []func(context.Context, *quota.Call){g.observe}}); err != nil {
		return nil, err
	}
	who := func(*http.Request) (string, error) { return quota.Key(tenant, "chat"), nil }
	most := func(r *http.Request) int64 {
		n, err := strconv.ParseInt(r.FormValue("max_tokens"), 10, 64)
		if err != nil || n < 1 || n > mostTokens {
			return mostTokens
		}
		return n
	}
	paidFirst := func(r *http.Request) int64 {
		if r.FormValue("tier") == "paid" {
			return 0
		}
		return reserve
	}
	usage := quotahttp.Usage.Tokens
	limits, err := quotahttp.New(g.limiter, &quotahttp.Options{
		Settle: map[string]func(quotahttp.Usage) int64{"tokens": usage, "budget": usage},
		Error:  func(*http.Request, error) {}, // a settle that failed is repeated, and told as a notice if it is given up
	}, quotahttp.By(who, requests), quotahttp.By(who, streams).Floor(paidFirst), quotahttp.By(who, tokens).Cost(most).Floor(paidFirst), quotahttp.By(who, budget).Cost(most))
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g.addr = listener.Addr().String()
	g.server = &http.Server{Handler: limits(http.HandlerFunc(g.chat)), ReadHeaderTimeout: time.Second}
	go g.server.Serve(listener)
	return g, nil
}

// kill ends a gateway as the end of its process would: its holds are neither renewed nor settled.
func (g *gateway) kill() {
	g.limiter.Close()
	g.server.Close()
}

// chat streams an answer of so many tokens as the model likes, 20 at a time.
func (g *gateway) chat(w http.ResponseWriter, r *http.Request) {
	g.say(event{Streams: 1})
	defer g.say(event{Streams: -1})
	receipt, most := quotahttp.From(r.Context()), mostTokens
	if n, err := strconv.Atoi(r.FormValue("max_tokens")); err == nil && 0 < n && n < most {
		most = n
	}
	w.Header().Set("Content-Type", "text/event-stream")
	used := 0
	for length := rand.N(most) + 1; used < length; {
		select {
		case <-r.Context().Done(): // the client left: the tokens that it got are charged
			_ = receipt.Settle("tokens", int64(used))
			_ = receipt.Settle("budget", int64(used))
			return
		case <-receipt.Lost():
			g.say(event{Lost: 1})
			return
		case <-time.After(100 * time.Millisecond):
		}
		used = min(used+20, length)
		fmt.Fprintf(w, "data: {\"choices\":[{\"delta\":{\"content\":%q}}]}\n\n", "lorem ipsum")
		_ = http.NewResponseController(w).Flush()
	}
	fmt.Fprintf(w, "data: {\"usage\":{\"completion_tokens\":%d,\"total_tokens\":%d}}\n\ndata: [DONE]\n\n", used, used)
}

// observe tells of the tokens that the budget was really charged.
func (g *gateway) observe(_ context.Context, c *quota.Call) {
	for i := range c.Decisions {
		if c.Granted && c.Charges[i].Op == quota.OpSpend && c.Charges[i].Limit.Name() == "budget" && !c.Decisions[i].Replayed {
			g.say(event{Spent: c.Decisions[i].Charged})
		}
	}
}

func (g *gateway) say(e event) {
	e.At = time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tell(e)
}

// client sends requests, one after the other, until the context ends, to one of the gateways, and to the next one when that does
// not answer. A quarter of its streams it leaves half-way.
func client(ctx context.Context, members []member, first int, tier string, tally *tally) {
	for ctx.Err() == nil {
		addr := members[first%len(members)].addr
		life, leave := context.WithCancel(ctx)
		r, err := http.NewRequestWithContext(life, "POST", fmt.Sprintf("http://%s/?tier=%s&max_tokens=%d", addr, tier, 50+rand.N(mostTokens-50)), nil)
		if err != nil {
			leave()
			return
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			leave()
			if ctx.Err() == nil {
				tally.add(tier, "failed")
				first++
			}
			continue
		}
		left := false
		if answer.StatusCode == http.StatusOK && rand.N(4) == 0 {
			left = true
			time.AfterFunc(time.Duration(rand.N(500))*time.Millisecond, leave)
		}
		_, err = io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
		leave()
		switch {
		case answer.StatusCode == http.StatusTooManyRequests:
			tally.add(tier, "denied")
			time.Sleep(time.Duration(100+rand.N(200)) * time.Millisecond) // sooner than Retry-After, for the run is short
		case answer.StatusCode != http.StatusOK, err != nil && !left && ctx.Err() == nil:
			tally.add(tier, "failed")
			first++
		case left:
			tally.add(tier, "left half-way")
		default:
			tally.add(tier, "answered")
		}
	}
}

// tally counts outcomes of requests by tier.
type tally struct {
	mu     sync.Mutex
	counts map[[2]string]int
}

func (t *tally) add(tier, outcome string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts[[2]string{tier, outcome}]++
}

func (t *tally) of(tier, outcome string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts[[2]string{tier, outcome}]
}

// decode reads the events of another process.
func decode(line []byte) (e event, err error) {
	err = json.Unmarshal(line, &e)
	return e, err
}
