package main

import (
	"fmt"
	"net/http"
	"net/netip"
	"os"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

func main() {
	minute := quota.Must(algorithm.ParseLimit("minute: 100/1m sliding"))
	day := quota.Must(algorithm.ParseLimit("day: 5000/24h fixed"))
	limiter := quota.Must(quota.NewLimiter(local.New(), minute, nil))
	ip := quotahttp.By(quotahttp.IP(quotahttp.Proxies(netip.MustParsePrefix("127.0.0.0/8"))), minute, day)
	key := quotahttp.By(quotahttp.Header("X-API-Key"), minute, day)
	limits := quota.Must(quotahttp.New(limiter, &quotahttp.Options{FailOpen: true}, ip, key))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/things", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "ok") })
	fmt.Println(http.ListenAndServe(os.Args[1], limits(mux)))
}
