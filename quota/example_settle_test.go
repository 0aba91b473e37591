package quota_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// A stream is settled when it ends, also where it ends because its client went away and the request's context with it.
func ExampleLimiter_Settle_stream() {
	daily := quota.Must(algorithm.ParseLimit("tokens: 10000/24h fixed"))
	limiter := quota.Must(quota.NewLimiter(local.New(), daily, nil))
	defer limiter.Close()
	settled := make(chan error)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		receipt, err := limiter.Take(r.Context(), "acme", 5000)
		if err != nil || !receipt.Allowed {
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		used := int64(10) // of which the handler keeps account while it streams
		defer func() { _, err := limiter.Settle(r.Context(), "acme", receipt, used); settled <- err }()
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	defer server.Close()

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	request, _ := http.NewRequestWithContext(ctx, http.MethodGet, server.URL, nil)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		fmt.Println(err)
		return
	}
	cancel() // in the middle of the stream
	response.Body.Close()
	fmt.Println("settled:", <-settled)
	d, _ := limiter.Peek(context.Background(), "acme", 0)
	fmt.Println("used:", d.Capacity-d.Remaining)
	// Output:
	// settled: <nil>
	// used: 10
}

// A tenant's plan changes between take and settle. The receipt is the old plan's: a settle under the new one is refused, and one
// that names the old limit corrects it.
func ExampleCharge_Settle() {
	ctx := context.Background()
	free, paid := quota.Must(algorithm.ParseLimit("free: 10000/24h fixed")), quota.Must(algorithm.ParseLimit("paid: 100000/24h fixed"))
	plan := free
	limiter := quota.Must(quota.NewLimiter(local.New(), free, &quota.Options{LimitFor: func(string) *quota.Limit { return plan }}))
	defer limiter.Close()

	under := plan // kept with the receipt
	receipt, _ := limiter.Take(ctx, "acme", 1000)
	plan = paid
	_, err := limiter.Settle(ctx, "acme", receipt, 5000)
	fmt.Println(errors.Is(err, quota.ErrInvalid))
	r, err := limiter.ChargeAll(ctx, quota.Charge{Limit: under, Key: "acme"}.Settle(receipt, 5000))
	fmt.Println(r.Decisions[0].Remaining, "of the old plan left,", err)
	d, _ := limiter.Peek(ctx, "acme", 0)
	fmt.Println(d.Remaining, "of the new one")
	// Output:
	// true
	// 5000 of the old plan left, <nil>
	// 100000 of the new one
}

// Another rule under a name that is in use is refused, and the list that has it is not charged: a new rule gets a new name.
func ExampleNewLimit_anotherRule() {
	ctx := context.Background()
	limiter := quota.Must(quota.NewLimiter(local.New(), quota.Must(algorithm.ParseLimit("calls: 10 burst 1/s bucket")), nil))
	defer limiter.Close()
	other := quota.NewLimit("calls", algorithm.SlidingWindow(10, time.Minute))
	budget := quota.Must(algorithm.ParseLimit("budget: 1000/24h fixed"))

	limiter.Take(ctx, "acme", 5)
	_, err := limiter.ChargeAll(ctx, quota.Charge{Limit: other, Key: "acme", Cost: 1}, quota.Charge{Limit: budget, Key: "acme", Cost: 1})
	fmt.Println(errors.Is(err, quota.ErrMisconfigured), quota.Charged(err))
	r, _ := limiter.ChargeAll(ctx, quota.Charge{Limit: budget, Key: "acme", Op: quota.OpPeek})
	fmt.Println("budget:", r.Decisions[0].Remaining)
	// Output:
	// true no
	// budget: 1000
}
