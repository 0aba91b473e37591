package quotatest_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

// perAgent and answer are the program under test.
var perAgent = quota.Must(algorithm.ParseLimit("tokens: 1000 burst 10/s bucket"))

func answer(ctx context.Context, limiter *quota.Limiter, agent string) string {
	switch err := limiter.Allow(ctx, agent, 600); quota.Charged(err) {
	case quota.WasCharged:
		return "an answer"
	default:
		return err.Error()
	}
}

// A test of a program: its t is that of the test.
func Example() {
	var t testing.TB = exampleTB{}
	store := quotatest.New(t, nil)
	limiter := quota.Must(quota.NewLimiter(store, perAgent, nil))
	ctx := context.Background()

	fmt.Println(answer(ctx, limiter, "agent-1"))
	fmt.Println(answer(ctx, limiter, "agent-1"))
	store.Advance(20 * time.Second) // 200 tokens come back
	fmt.Println(answer(ctx, limiter, "agent-1"))
	store.Fail(quota.ErrUnavailable)
	fmt.Println(answer(ctx, limiter, "agent-1"))
	store.WantCharged(perAgent, "agent-1", 1200)
	// Output:
	// an answer
	// quota: denied by limit "tokens: 1000 burst 10/s bucket": 400 of 1000 left, retry after 20s
	// an answer
	// store unavailable
}

// exampleTB stands for the t of a test, which examples do not have.
type exampleTB struct{ testing.TB }

func (exampleTB) Cleanup(func()) {}
func (exampleTB) Helper()        {}
