package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/go-chi/httprate"
	"github.com/sethvargo/go-limiter/httplimit"
	"github.com/sethvargo/go-limiter/memorystore"
	ulule "github.com/ulule/limiter/v3"
	"github.com/ulule/limiter/v3/drivers/middleware/stdlib"
	ululememory "github.com/ulule/limiter/v3/drivers/store/memory"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

// httpX is this library with the fields that its peers write.
const httpX = "fleetquota, X-RateLimit"

// httpSubjects limit requests by the client's address, in memory.
var httpSubjects = []subject{
	{httpX, ours, openMiddleware(quotahttp.GitHub)},
	{"fleetquota, RateLimit of the draft", ours, openMiddleware(quotahttp.IETF)},
	{"httprate", peer, func(n numbers, _ *target) (take, func(), error) {
		return throughHandler(httprate.LimitBy(int(n.capacity), day, func(r *http.Request) (string, error) {
			ip, _, err := net.SplitHostPort(r.RemoteAddr)
			return httprate.CanonicalizeIP(ip), err
		})), func() {}, nil
	}},
	{"ulule/limiter", peer, func(n numbers, _ *target) (take, func(), error) {
		limiter := ulule.New(ululememory.NewStore(), ulule.Rate{Period: day, Limit: n.capacity})
		return throughHandler(stdlib.NewMiddleware(limiter).Handler), func() {}, nil
	}},
	{"sethvargo/httplimit", peer, openHTTPLimit},
	{"no limit", floor, func(numbers, *target) (take, func(), error) {
		return throughHandler(func(next http.Handler) http.Handler { return next }), func() {}, nil
	}},
}

func openMiddleware(headers quotahttp.Headers) func(numbers, *target) (take, func(), error) {
	return func(n numbers, _ *target) (take, func(), error) {
		limit := bucket(n)
		limiter, err := quota.NewLimiter(local.New(), limit, nil)
		if err != nil {
			return nil, nil, err
		}
		limits, err := quotahttp.New(limiter, &quotahttp.Options{Headers: headers}, quotahttp.By(quotahttp.IP(quotahttp.Peer), limit))
		if err != nil {
			return nil, nil, err
		}
		return throughHandler(limits), func() { limiter.Close() }, nil
	}
}

func openHTTPLimit(n numbers, _ *target) (take, func(), error) {
	store, err := memorystore.New(&memorystore.Config{
		Tokens: uint64(n.capacity), Interval: time.Duration(n.capacity) * n.period,
		SweepInterval: day, SweepMinTTL: day,
	})
	if err != nil {
		return nil, nil, err
	}
	m, err := httplimit.NewMiddleware(store, httplimit.IPKeyFunc())
	if err != nil {
		return nil, nil, err
	}
	return throughHandler(m.Handle), func() { store.Close(context.Background()) }, nil
}

// exchange is a request and its answer, of which the fields and the status are kept.
type exchange struct {
	request *http.Request
	header  http.Header
	status  int
}

func (x *exchange) Header() http.Header         { return x.header }
func (x *exchange) Write(p []byte) (int, error) { return len(p), nil }
func (x *exchange) WriteHeader(status int)      { x.status = status }

// throughHandler sends requests through middleware, one for each take. A key's number is the client's
// address.
func throughHandler(limits func(http.Handler) http.Handler) take {
	h := limits(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }))
	var addresses sync.Map // of string, by key: no peer should pay for their texts
	pool := sync.Pool{New: func() any {
		r, _ := http.NewRequest("GET", "http://127.0.0.1/v1/things", nil)
		return &exchange{request: r, header: http.Header{}}
	}}
	return func(_ context.Context, key string) (bool, error) {
		address, ok := addresses.Load(key)
		if !ok {
			n, err := strconv.Atoi(key[len("agent-"):])
			if err != nil {
				return false, err
			}
			address, _ = addresses.LoadOrStore(key, fmt.Sprintf("10.%d.%d.%d:4711", n>>16&255, n>>8&255, n&255))
		}
		x := pool.Get().(*exchange)
		defer pool.Put(x)
		clear(x.header)
		x.request.RemoteAddr = address.(string)
		h.ServeHTTP(x, x.request)
		if x.status != http.StatusOK && x.status != http.StatusTooManyRequests {
			return false, fmt.Errorf("status %d", x.status)
		}
		return x.status == http.StatusOK, nil
	}
}

func (r *runner) http() {
	one, all := newKeyset(1), newKeyset(r.size.redis)
	goroutines := []int{1, r.size.many()}
	r.eachCount("http", httpSubjects, func(s subject) {
		for _, denied := range []bool{false, true} {
			r.visit(s, nil, one, denied, r.closed(work{section: "http", keys: 1, denied: denied}, goroutines...))
			r.visit(s, nil, all, denied, r.closed(work{section: "http", keys: all.len(), denied: denied}, goroutines...))
		}
	})
}
