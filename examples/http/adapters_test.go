package http_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/adaptor"
	"github.com/labstack/echo/v4"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

var tokens = quota.Must(algorithm.ParseLimit("tokens: 100/1m fixed"))

// newLimits returns middleware that charges 40 tokens for each value of X-Api-Key.
func newLimits(t *testing.T, store quota.Store) func(http.Handler) http.Handler {
	limiter := quota.Must(quota.NewLimiter(store, tokens, nil))
	cost := func(*http.Request) int64 { return 40 }
	return quota.Must(quotahttp.New(limiter, nil, quotahttp.By(quotahttp.Header("X-API-Key"), tokens).Cost(cost)))
}

// The one line of each framework. Each handler settles its 40 tokens to 35, and its errors stay the framework's own.
var adapters = map[string]func(limits func(http.Handler) http.Handler) func(*http.Request) (*http.Response, error){
	"chi": func(limits func(http.Handler) http.Handler) func(*http.Request) (*http.Response, error) {
		r := chi.NewRouter()
		r.Use(limits)
		r.Get("/", func(w http.ResponseWriter, r *http.Request) {
			_ = quotahttp.From(r.Context()).Settle("tokens", 35)
			_, _ = w.Write([]byte("ok"))
		})
		return record(r)
	},
	"gin": func(limits func(http.Handler) http.Handler) func(*http.Request) (*http.Response, error) {
		gin.SetMode(gin.ReleaseMode)
		r := gin.New()
		r.GET("/", func(c *gin.Context) {
			_ = quotahttp.From(c.Request.Context()).Settle("tokens", 35)
			c.String(200, "ok")
		})
		return record(limits(r))
	},
	"echo": func(limits func(http.Handler) http.Handler) func(*http.Request) (*http.Response, error) {
		e := echo.New()
		e.Use(echo.WrapMiddleware(limits))
		e.GET("/", func(c echo.Context) error {
			_ = quotahttp.From(c.Request().Context()).Settle("tokens", 35)
			return c.String(200, "ok")
		})
		return record(e)
	},
	"fiber": func(limits func(http.Handler) http.Handler) func(*http.Request) (*http.Response, error) {
		app := fiber.New()
		app.Use(adaptor.HTTPMiddleware(limits))
		app.Get("/", func(c fiber.Ctx) error { return c.SendString("ok") })
		return func(r *http.Request) (*http.Response, error) { return app.Test(r) }
	},
}

func record(h http.Handler) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Result(), nil
	}
}

func TestAdapters(t *testing.T) {
	for name, adapt := range adapters {
		t.Run(name, func(t *testing.T) {
			store := quotatest.New(t, nil)
			send := adapt(newLimits(t, store))
			left := [...]int{60, 25, 30}
			if name == "fiber" { // its handlers have no receipt
				left = [...]int{60, 20, 20}
			}
			for i, left := range left {
				r := httptest.NewRequest("GET", "/", nil)
				r.Header.Set("X-API-Key", "sk-1")
				resp, err := send(r)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				status, retry, limit := 200, "", fmt.Sprintf(`"tokens";r=%d;t=60`, left)
				if i == 2 {
					status, retry = 429, "60"
				}
				if resp.StatusCode != status || resp.Header.Get("RateLimit") != limit || resp.Header.Get("Retry-After") != retry {
					t.Errorf("answer %d: got %d, %v; want %d, %s, retry after %q", i, resp.StatusCode, resp.Header, status, limit, retry)
				}
			}
		})
	}
}

// The page shows the programs as they are, and the lines of the adapters.
func TestPage(t *testing.T) {
	b, err := os.ReadFile("../../docs/http.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	for _, file := range []string{"rest/main.go", "rest-httprate/main.go", "rest-ulule/main.go"} {
		program, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(page, "\n```\n"+string(program)+"```\n") {
			t.Errorf("docs/http.md: got another program than %s, want it as it is", file)
		}
		lines := 0
		for line := range strings.Lines(string(program)) {
			if strings.TrimSpace(line) != "" {
				lines++
			}
		}
		if file == "rest/main.go" && lines > 25 {
			t.Errorf("lines of %s that are not empty: got %d, want at most 25", file, lines)
		}
	}
	test, err := os.ReadFile("adapters_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"r.Use(limits)", "limits(r)", "e.Use(echo.WrapMiddleware(limits))", "app.Use(adaptor.HTTPMiddleware(limits))"} {
		if !strings.Contains(page, "`"+line+"`") || !strings.Contains(string(test), line) {
			t.Errorf("adapter %s: got none on the page or in the test, want it on both", line)
		}
	}
}
