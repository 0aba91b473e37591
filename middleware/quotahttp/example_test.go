package quotahttp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

// Two requests a minute for each address.
func ExampleNew() {
	minute := quota.Must(algorithm.ParseLimit("minute: 2/1m sliding"))
	limiter := quota.Must(quota.NewLimiter(local.New(), minute, nil))
	defer limiter.Close()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/things", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "things") })
	limits := quota.Must(quotahttp.New(limiter, nil, quotahttp.By(quotahttp.IP(quotahttp.Peer), minute)))
	server := httptest.NewServer(limits(mux))
	defer server.Close()

	for range 3 {
		resp := quota.Must(http.Get(server.URL + "/v1/things"))
		resp.Body.Close()
		fmt.Println(resp.StatusCode, resp.Header.Get("RateLimit-Policy"))
	}
	// Output:
	// 200 "minute";q=2;w=60
	// 200 "minute";q=2;w=60
	// 429 "minute";q=2;w=60
}

// An estimate that is charged before a call to a model, and settled by the handler's word or the answer's.
func ExampleReceipt_Settle() {
	tokens := quota.Must(algorithm.ParseLimit("tokens: 1000 burst 10/s bucket"))
	limiter := quota.Must(quota.NewLimiter(local.New(), tokens, nil))
	defer limiter.Close()
	estimate := func(r *http.Request) int64 { return 400 }
	limits := quota.Must(quotahttp.New(limiter, &quotahttp.Options{
		Settle: map[string]func(quotahttp.Usage) int64{"tokens": quotahttp.Usage.Tokens},
		Refund: func(status int) bool { return status >= 500 },
	}, quotahttp.By(quotahttp.Header("Authorization"), tokens).Cost(estimate)))
	mux := http.NewServeMux()
	mux.HandleFunc("/said", func(w http.ResponseWriter, r *http.Request) {
		if err := quotahttp.From(r.Context()).Settle("tokens", 300); err != nil {
			fmt.Println(err)
		}
	})
	mux.HandleFunc("/read", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"usage":{"prompt_tokens":20,"completion_tokens":30,"total_tokens":50}}`)
	})
	mux.HandleFunc("/failed", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	for _, path := range []string{"/said", "/read", "/failed", "/"} {
		r := httptest.NewRequest("POST", path, nil)
		r.Header.Set("Authorization", "Bearer sk-1")
		w := httptest.NewRecorder()
		limits(mux).ServeHTTP(w, r)
		fmt.Println(path, w.Header().Get("RateLimit"))
	}
	// Output:
	// /said "tokens";r=600;t=40
	// /read "tokens";r=300;t=70
	// /failed "tokens";r=250;t=75
	// / "tokens";r=250;t=75
}

// A client of which all processes together have at most one stream open at a server.
func ExampleNewTransport_streams() {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "data: hello") }))
	defer server.Close()
	streams := quota.NewLimit("streams", algorithm.Concurrency(1, time.Minute))
	limiter := quota.Must(quota.NewLimiter(local.New(), streams, nil))
	defer limiter.Close()
	client := http.Client{Transport: quota.Must(quotahttp.NewTransport(limiter, nil, quotahttp.By(quotahttp.Host, streams)))}

	first := quota.Must(client.Get(server.URL))
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_, err := client.Do(quota.Must(http.NewRequestWithContext(ctx, "GET", server.URL, nil)))
	fmt.Println("while the first is open:", errors.Is(err, context.DeadlineExceeded))
	first.Body.Close()
	second := quota.Must(client.Get(server.URL))
	fmt.Println("when it is closed:", second.StatusCode)
	second.Body.Close()
	// Output:
	// while the first is open: true
	// when it is closed: 200
}
